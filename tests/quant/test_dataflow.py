"""What is followed through a forward: dependence, what is needed, the same bits when replayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant._dataflow import watch
from quant._program import program, small_enough, table_bytes


class Toy(nn.Module):
    """A time embedding, a projection of it, one of the text, and data that meets both."""

    def __init__(self, how: str = "plain"):
        super().__init__()
        self.how = how
        self.embed, self.project = nn.Linear(4, 8), nn.Linear(8, 8)
        self.text, self.data = nn.Linear(3, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(1, 1) if how == "unused" else None
        self.act = nn.SiLU()

    def forward(self, x, timestep, text):
        base = torch.arange(4, dtype=torch.float32)
        temb = self.act(self.embed(torch.sin(timestep[:, None] * base)))
        scale = self.project(temb)
        if self.how == "in place":
            scale.add_(1.0)
        if self.how == "mixed in place":
            scale.add_(x.mean())
        if self.how == "python" and float(timestep[0]) > 3:
            scale = scale * 2
        if self.how == "embedding too":
            x = x + temb
        if self.how == "twice":
            scale = scale + self.project(temb * 2)
        if self.how == "text and time":
            return self.data(self.act(x)) * (scale + self.text(text)) + self.project(temb)
        return self.data(self.act(x)) * scale + self.text(text)


def _watched(how="plain", held=("timestep", "text")):
    torch.manual_seed(0)
    module = Toy(how)
    given = {"timestep": torch.tensor([5.0, 5.0]), "text": torch.randn(2, 3)}
    x = torch.randn(2, 8)
    with torch.no_grad():
        seen = watch(module, lambda: module(x, **given), {k: given[k] for k in held})
    return module, seen, given, x


def _play(module, plan, given, times):
    weights = dict(module.named_parameters())
    with torch.no_grad():
        return plan.play(weights.__getitem__, given, times)


def test_what_feeds_only_known_modules_is_not_needed():
    module, seen, _, _ = _watched()
    plan = program(seen, module)
    assert set(plan.served) == {"embed", "project", "text"}
    assert plan.needed == {"project", "text"}
    assert plan.served["project"].labels == {"timestep"}
    assert plan.served["text"].labels == {"text"}


def test_what_is_not_held_fixed_is_data():
    module, seen, _, _ = _watched(held=("timestep",))
    assert set(program(seen, module).served) == {"embed", "project"}


def test_an_output_that_data_sees_as_well_is_needed():
    module, seen, _, _ = _watched("embedding too")
    assert program(seen, module).needed == {"embed", "project", "text"}


def test_a_module_that_this_call_left_out_may_ask_for_anything():
    module, seen, _, _ = _watched("unused")
    assert program(seen, module).needed == {"embed", "project", "text"}


def test_a_module_called_with_different_inputs_is_left_alone():
    module, seen, _, _ = _watched("twice")
    plan = program(seen, module)
    assert set(plan.served) == {"embed", "text"}
    assert "embed" in plan.needed


def test_a_module_called_twice_alike_is_served():
    module, seen, _, _ = _watched("text and time")
    assert set(program(seen, module).served) == {"embed", "project", "text"}


def test_data_written_into_a_known_tensor_makes_it_data():
    module, seen, _, _ = _watched("mixed in place")
    plan = program(seen, module)
    assert "project" in plan.needed  # its output, before the write, is known


def test_a_timestep_that_python_reads_is_told():
    _, seen, _, _ = _watched("python")
    assert seen.read_by_python == {"timestep"}


@pytest.mark.parametrize("how", ["plain", "in place", "embedding too", "unused", "text and time"])
def test_replayed_at_other_times_it_gives_the_same_bits(how):
    module, seen, given, x = _watched(how)
    plan = program(seen, module)
    times = [torch.full((2,), float(t)) for t in (5, 2, 9)]
    played = _play(module, plan, given, times)
    for time, made in zip(times, played, strict=True):
        call = given | {"timestep": time}
        with torch.no_grad():
            again = watch(module, lambda call=call: module(x, **call), call)
        for path in plan.needed:
            expected = again.calls[path][0].tensors
            for a, b in zip(made[path], expected, strict=True):
                if how != "in place":  # there the caller changes what it was given
                    assert torch.equal(a, b), path


def test_a_module_that_costs_more_than_it_saves_is_computed():
    """1000 rows of 8 numbers are more than either time module's weights; one row of text is not."""
    module, seen, _, _ = _watched()
    plan = program(seen, module, small_enough(module, steps=1000, largest=1.0))
    assert set(plan.served) == {"text"}
    assert table_bytes(seen.calls["project"][0], 1000) == 1000 * 8 * 4
    assert table_bytes(seen.calls["text"][0], 1000) == 2 * 8 * 4  # the texts of two rows


def test_the_meta_device_tells_the_same():
    with torch.device("meta"):
        module = Toy()
        given = {"timestep": torch.empty(2), "text": torch.empty(2, 3)}
        x = torch.empty(2, 8)
        with torch.no_grad():
            plan = program(watch(module, lambda: module(x, **given), given), module)
    assert set(plan.served) == {"embed", "project", "text"}


def test_nothing_stays_on_the_module():
    module, _, _, _ = _watched()
    assert all("forward" not in vars(m) for m in module.modules())
