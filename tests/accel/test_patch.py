"""Reversible changes, in any order, with foreign wrappers around and below."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from hypothesis import given
from hypothesis import strategies as st

from accel.patch import Patch, Trampoline, at_home, values_of
from accel.testing import GraphKeeper


class Doubler(torch.nn.Module):
    def forward(self, x, scale: float = 2.0):
        return x * scale


def _tag(text):
    def layer(call_next, x, *args, **kwargs):
        return [*call_next(x, *args, **kwargs), text]

    return layer


class Host:
    def call(self, x):
        return [x]


def test_layers_nest_in_order_and_outer_ones_outside():
    host, a, b = Host(), Patch(), Patch()
    a.around(host, "call", _tag("clock"), outer=True)
    b.around(host, "call", _tag("first"))
    b.around(host, "call", _tag("second"))
    assert host.call(0) == [0, "first", "second", "clock"]
    b.undo()
    assert host.call(0) == [0, "clock"]
    a.undo()
    assert vars(host) == {}


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30))
def test_any_sequence_of_patching_and_undoing(moves):
    """Model: the live patches in order. The host must always show exactly their layers."""
    host, live = Host(), []
    for n, (which, add) in enumerate(moves):
        if add or not live:
            patch = Patch()
            patch.around(host, "call", _tag(n))
            live.append((n, patch))
        else:
            live.pop(which % len(live))[1].undo()
        assert host.call("x") == ["x"] + [n for n, _ in live]
    for _, patch in live:
        patch.undo()
    assert vars(host) == {}


@given(st.permutations(range(5)), st.permutations(range(5)))
def test_swaps_undo_in_any_order(values, undo_order):
    host = Host()
    host.setting = "base"
    patches = []
    for value in values:
        patch = Patch()
        patch.swap(host, "setting", value)
        patches.append((value, patch))
    alive = [v for v, _ in patches]
    for i in undo_order:
        value, patch = patches[i]
        patch.undo()
        alive.remove(value)
        assert host.setting == (alive[-1] if alive else "base")


def test_swap_leaves_what_the_user_assigned_since():
    host, patch = Host(), Patch()
    host.setting = 1
    patch.swap(host, "setting", 2)
    host.setting = 3
    patch.undo()
    assert host.setting == 3


def test_swap_of_a_missing_attribute():
    host, patch = Host(), Patch()
    patch.swap(host, "extra", 1)
    patch.undo()
    assert vars(host) == {}


def test_captured_trampoline_is_a_pass_through_until_topmost_again():
    host, patch = Host(), Patch()
    patch.around(host, "call", _tag("ours"))
    ours = host.call
    host.call = functools.wraps(ours)(lambda x: [*ours(x), "theirs"])
    assert host.call(0) == [0, "ours", "theirs"]
    patch.undo()
    assert host.call(0) == [0, "theirs"]
    host.call = ours  # the foreign wrapper goes, restoring what it had found: our empty shell
    assert host.call(0) == [0]
    assert vars(host) == {}, "the shell removes itself when called as the topmost"


def test_thrown_away_trampoline_comes_back():
    host, patch = Host(), Patch()
    patch.around(host, "call", _tag("ours"))
    del host.call
    assert host.call(0) == [0]
    patch.ensure()
    assert host.call(0) == [0, "ours"]
    patch.undo()
    assert vars(host) == {}


def test_diffusers_registry_that_bypasses_us_is_noticed():
    """remove_hook of an inner hook rewires the outer one past our trampoline."""
    module, patch = Doubler(), Patch()
    seen = []

    def layer(call_next, *args, **kwargs):
        seen.append(1)
        return call_next(*args, **kwargs)

    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(ModelHook(), "below")
    patch.around(module, "forward", layer)
    registry.register_hook(ModelHook(), "above")
    module(torch.ones(1))
    assert len(seen) == 1
    registry.remove_hook("below")
    module(torch.ones(1))
    assert len(seen) == 1, "diffusers mended remove_hook: compat.wrapped_callable can be simpler"
    patch.ensure()
    module(torch.ones(1))
    assert len(seen) == 2


def test_signature_and_name_follow_the_original():
    module, patch = Doubler(), Patch()
    before = inspect.signature(module.forward)
    patch.around(module, "forward", lambda call_next, *a, **k: call_next(*a, **k))
    assert isinstance(module.forward.__self__, Trampoline)
    assert inspect.signature(module.forward) == before
    assert module.forward.__name__ == "forward"
    patch.undo()


def test_a_deep_copy_is_unpatched_and_bound_to_itself():
    module, patch = Doubler(), Patch()
    module.factor = torch.nn.Parameter(torch.ones(1))
    patch.around(module, "forward", lambda call_next, *a, **k: call_next(*a, **k) + 100)
    twin = copy.deepcopy(module)
    module.factor.data += 10
    assert twin(torch.ones(1)) == 2
    assert copy.deepcopy(twin)(torch.ones(1)) == 2
    assert pickle.loads(pickle.dumps(twin))(torch.ones(1)) == 2
    patch.undo()


def test_layer_follows_a_module_compiled_later():
    module, patch = Doubler(), Patch()
    eager = []

    def layer(call_next, *args, **kwargs):
        eager.append(torch.compiler.is_compiling())
        return call_next(*args, **kwargs)

    patch.around_call(module, layer)
    module.compile(fullgraph=True, backend="eager")
    patch.ensure()
    assert module(torch.ones(1)) == 2
    assert eager == [False], "the layer runs outside the graph"
    patch.undo()
    assert "forward" not in vars(module)


def test_modules_that_are_alike_share_a_graph_under_layers():
    """Dynamo would make one for each layered module if callable objects stood in `forward`."""
    torch._dynamo.reset()
    keeper, patch = GraphKeeper(), Patch()

    outer = [torch.nn.Sequential(Doubler()) for _ in range(3)]
    for module in outer:
        patch.around(module[0], "forward", lambda call_next, *a, **k: call_next(*a, **k) + 100)
        module.compile(fullgraph=True, backend=keeper)
    assert [float(module(torch.ones(1))) for module in outer] == [102.0] * 3
    assert len(keeper.graphs) == 1
    patch.undo()
    torch._dynamo.reset()


def test_one_layer_function_on_several_modules_follows_each():
    modules, patch, calls = [Doubler(), Doubler()], Patch(), []

    def layer(call_next, *args, **kwargs):
        calls.append(torch.compiler.is_compiling())
        return call_next(*args, **kwargs)

    for module in modules:
        patch.around_call(module, layer)
    modules[1].compile(fullgraph=True, backend="eager")
    patch.ensure()
    patch.ensure()
    for module in modules:
        module(torch.ones(1))
    assert calls == [False, False]
    patch.undo()
    assert all("forward" not in vars(module) for module in modules)


def test_a_pickled_owner_is_unpatched():
    module, patch = Doubler(), Patch()
    patch.around(module, "forward", lambda call_next, *a, **k: call_next(*a, **k) + 100)
    again = pickle.loads(pickle.dumps(module))
    assert again(torch.ones(1)) == 2
    assert again.forward.__self__ is again
    patch.undo()


def test_a_swap_never_undone_does_not_keep_its_owner():
    host, patch = Host(), Patch()
    host.setting = 1
    patch.swap(host, "setting", 2)
    patch.around(host, "call", lambda call_next, x, host_kept=host: call_next(x))
    owner = weakref.ref(host)
    del host, patch
    gc.collect()
    assert owner() is None


@pytest.mark.parametrize("times", [1, 2])
def test_undo_is_idempotent(times):
    host, patch = Host(), Patch()
    patch.around(host, "call", _tag(1))
    for _ in range(times):
        patch.undo()
    assert vars(host) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_values_go_and_the_tensor_stays(dtype):
    weight, patch = torch.nn.Parameter(torch.randn(3, 2).to(dtype)), Patch()
    before, place = weight.detach().clone(), weight.data_ptr()
    patch.write(weight, torch.full((3, 2), 0.5, dtype=torch.float64))
    assert (weight == 0.5).all()
    patch.write(weight, torch.zeros(3, 2))
    patch.undo()
    patch.undo()
    assert torch.equal(weight, before)
    assert weight.data_ptr() == place
    assert weight.dtype == dtype
    assert weight.requires_grad


def test_values_of_another_shape_are_not_written():
    weight, patch = torch.nn.Parameter(torch.ones(3, 2)), Patch()
    with pytest.raises(RuntimeError):
        patch.write(weight, torch.zeros(4, 5))
    patch.undo()
    assert (weight == 1).all()


class _Kept:
    """A home that keeps a copy."""

    def __init__(self, tensor):
        self.held = tensor.detach().clone()

    def load(self, like):
        return self.held.to(like.device, like.dtype)

    def store(self, values):
        self.held = values.to(self.held.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lent_tensor_takes_no_room_and_comes_back(dtype):
    weight, patch = torch.nn.Parameter(torch.randn(3, 2).to(dtype)), Patch()
    before = weight.detach().clone()
    patch.lend(weight, _Kept(weight))
    assert weight.isnan().all()
    assert (weight.shape, weight.dtype) == ((3, 2), dtype)
    assert weight.untyped_storage().nbytes() == weight.element_size()
    assert torch.equal(values_of(weight), before)
    with at_home([weight]):
        with at_home([weight]):
            assert torch.equal(weight, before)
        assert torch.equal(weight, before), "the inner block sent it away"
    assert weight.isnan().all()
    patch.undo()
    assert torch.equal(weight, before)
    assert weight.is_contiguous()


@pytest.mark.parametrize("first", ["lend", "write"])
def test_a_tensor_that_is_lent_and_written(first):
    weight, lends, writes = torch.nn.Parameter(torch.randn(3, 2)), Patch(), Patch()
    before, values = weight.detach().clone(), torch.full((3, 2), 0.5)
    lends.lend(weight, _Kept(weight))
    writes.write(weight, values)
    assert torch.equal(values_of(weight), values)
    (lends if first == "lend" else writes).undo()
    if first == "lend":
        assert torch.equal(weight, values)
    (writes if first == "lend" else lends).undo()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_of_a_module_whose_weights_are_lent_are_whole(how):
    module, patch = torch.nn.Linear(4, 4), Patch()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tied, attributes = torch.nn.ModuleList([module, module]), dict(vars(module.weight))
    patch.lend(module.weight, _Kept(module.weight))
    if how == "deepcopy":
        made = copy.deepcopy(tied)
    elif how == "pickle":
        made = pickle.loads(pickle.dumps(tied))
    else:
        torch.save(tied, file := io.BytesIO())
        file.seek(0)
        made = torch.load(file, weights_only=False)
    assert module.weight.isnan().all()
    patch.undo()
    assert made[0].weight is made[1].weight
    assert made[0].weight.requires_grad
    assert vars(module.weight) == vars(made[0].weight) == attributes
    with torch.no_grad():
        made[0].weight += 1
    assert torch.equal(made[0].weight, before["weight"] + 1)
    assert torch.equal(module.weight, before["weight"])


@pytest.mark.parametrize("what", ["lend", "write"])
def test_one_patch_at_a_time_has_a_tensor(what):
    weight, first, second = torch.nn.Parameter(torch.randn(3, 2)), Patch(), Patch()
    before = weight.detach().clone()

    def take(patch):
        if what == "lend":
            patch.lend(weight, _Kept(values_of(weight)))
        else:
            patch.write(weight, torch.zeros(3, 2))

    take(first)
    with pytest.raises(ValueError, match=r"by another method already.*detach that one first"):
        take(second)
    second.undo()
    first.undo()
    assert torch.equal(weight, before)
    take(second)
    second.undo()
    assert torch.equal(weight, before)


def test_a_lent_tensor_comes_back_in_the_type_that_it_has_then():
    module, patch = torch.nn.Linear(4, 4), Patch()
    expected = module.weight.detach().to(torch.bfloat16)
    patch.lend(module.weight, _Kept(module.weight))
    module.to(torch.bfloat16)
    patch.undo()
    assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("again", [True, False])
def test_a_lent_tensor_that_was_cast_is_still_away(again):
    """Casting spreads the stand-in to the size of the values."""
    module, patch = torch.nn.Linear(4, 4), Patch()
    expected = module.weight.detach().to(torch.float64)
    patch.lend(module.weight, _Kept(module.weight))
    module.to(torch.float64)
    for _ in range(1 + again):
        with at_home([module.weight]):
            assert torch.equal(module.weight, expected)
        assert module.weight.isnan().all()
    patch.undo()
    assert torch.equal(module.weight, expected)


def test_a_tensor_given_back_while_it_is_at_home_stays():
    weight, patch = torch.nn.Parameter(torch.randn(3, 2)), Patch()
    before = weight.detach().clone()
    patch.lend(weight, _Kept(weight))
    with at_home([weight]):
        patch.undo()
    assert torch.equal(weight, before)


class _Full(_Kept):
    """Has no room for its values at first."""

    tries = 0

    def load(self, like):
        self.tries += 1
        if self.tries == 1:
            raise RuntimeError("out of memory")
        return super().load(like)


def test_what_cannot_be_undone_keeps_nothing_else_from_it():
    module, other, patch = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), Patch()
    before, state = module.weight.detach().clone(), dict(vars(module))
    held = other.bias.detach().clone()
    patch.lend(module.weight, _Full(module.weight))
    patch.write(other.bias, torch.zeros(3))
    patch.swap(module, "in_features", 5)
    patch.around_call(module, lambda call_next, x: call_next(x) + 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        patch.undo()
    assert dict(vars(module)) == state
    assert torch.equal(other.bias, held)
    patch.undo()
    assert torch.equal(module.weight, before)
