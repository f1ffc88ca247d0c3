"""Every private diffusers name, by name: the first file to run on a new diffusers minor."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from accel import compat
from accel.testing import tiny


@pytest.mark.parametrize("purpose", compat.CONTRACT)
def test_name_is_where_it_was(purpose):
    assert compat.lookup(purpose) is not None


def test_a_moved_name_is_reported_by_name(monkeypatch):
    monkeypatch.setitem(compat.CONTRACT, "gone", "diffusers.hooks.hooks:HookRegistry.nowhere")
    with pytest.raises(ImportError, match=r"HookRegistry\.nowhere.*\(gone\)"):
        compat.lookup("gone")


@pytest.mark.parametrize(
    ("purpose", "parameters"),
    [
        ("per-branch cache state", ["self", "context"]),
        ("first-block cache", ["module", "config"]),
        ("MagCache", ["module", "config"]),
        ("TaylorSeer", ["module", "config"]),
        ("first-block cache head", ["self", "module", "args", "kwargs"]),
        ("TaylorSeer module", ["self", "module", "args", "kwargs"]),
    ],
)
def test_signature_is_what_we_call(purpose, parameters):
    assert list(inspect.signature(compat.lookup(purpose)).parameters) == parameters


def test_fields_we_read():
    reference = compat.lookup("links of a hook chain")()
    assert {"forward", "original_forward"} <= set(vars(reference))
    context = compat.lookup("name of the branch being computed")("cond")
    assert context.name == "cond"
    registry = inspect.getsource(compat.lookup("hook chain of a module"))
    assert "functools.partial(rewritten_forward" in registry


def test_private_names_of_the_host_are_touched_nowhere_else():
    """Names with a leading underscore that belong to diffusers, accelerate or torch."""
    root = Path(compat.__file__).parents[1]
    private = {
        *("_diffusers_hook", "_fn_refs", "_hook_order", "_hf_hook", "_old_forward"),
        *("_cache_config", "_state_cache", "_reset_stateful_cache", "_child_registries_cache"),
        *("_compiled_call_impl", "_call_impl", "_orig_mod", "_shared_state"),
    }
    for folder in ("accel", "samplers", "caches", "quant", "sparse_attn", "apps"):
        for path in (root / folder).rglob("*.py"):
            if path.name == "compat.py":
                continue
            tree = ast.parse(path.read_text())
            used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
            used |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} & private
            modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not used & private, f"{path}: {used & private}"
            hidden = {m for m in modules if m.startswith("diffusers") and "._" in m}
            assert not hidden, f"{path}: {hidden}"


def test_adopting_hooks_leaves_the_model_alone():
    from diffusers.hooks import FirstBlockCacheConfig

    from accel.testing import assert_same_state, host_state

    host = tiny("wan")
    state = host_state(host.pipe)
    apply = compat.lookup("first-block cache")
    hooks = compat.adopt_hooks(lambda m: apply(m, FirstBlockCacheConfig()), host.pipe.transformer)
    assert len(hooks) == len(host.pipe.transformer.blocks)
    assert len(compat.state_managers(hooks)) == 1
    assert_same_state(state, host_state(host.pipe))
