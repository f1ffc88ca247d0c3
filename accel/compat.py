"""Every private or unstable diffusers name the project touches, and nothing else.

``CONTRACT`` lists them by what they are for; ``tests/accel/test_compat.py`` resolves each one and
fails by name when a diffusers release moves it. Checked against diffusers 0.42.1.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.compiler import is_compiling as is_compiling

# what we use it for -> "module:attribute" (or "module:Class.attribute")
CONTRACT: dict[str, str] = {
    "hook chain of a module": "diffusers.hooks.hooks:HookRegistry.register_hook",
    "links of a hook chain": "diffusers.hooks.hooks:HookFunctionReference",
    "per-branch cache state": "diffusers.hooks.hooks:StateManager.set_context",
    "name of the branch being computed": "diffusers.hooks.hooks:CacheContext",
    "block metadata": "diffusers.hooks._helpers:TransformerBlockRegistry.get",
    "names of block lists": "diffusers.hooks._common:_ALL_TRANSFORMER_BLOCK_IDENTIFIERS",
    "first-block cache": "diffusers.hooks.first_block_cache:apply_first_block_cache",
    "first-block cache head": "diffusers.hooks.first_block_cache:FBCHeadBlockHook.new_forward",
    "first-block cache block": "diffusers.hooks.first_block_cache:FBCBlockHook.new_forward",
    "MagCache": "diffusers.hooks.mag_cache:apply_mag_cache",
    "MagCache head": "diffusers.hooks.mag_cache:MagCacheHeadHook.new_forward",
    "MagCache block": "diffusers.hooks.mag_cache:MagCacheBlockHook.new_forward",
    "MagCache ratio interpolation": "diffusers.hooks.mag_cache:nearest_interp",
    "TaylorSeer": "diffusers.hooks.taylorseer_cache:apply_taylorseer_cache",
    "TaylorSeer module": "diffusers.hooks.taylorseer_cache:TaylorSeerCacheHook.new_forward",
    "TaylorSeer state": "diffusers.hooks.taylorseer_cache:TaylorSeerState.predict",
    "leaving dispatch modes": "torch.utils._python_dispatch:_disable_current_modes",
    "attention kernels": "diffusers.models.attention_dispatch:_AttentionBackendRegistry",
    "names of attention kernels": "diffusers.models.attention_dispatch:AttentionBackendName",
    "attention by a kernel": "diffusers.models.attention_dispatch:dispatch_attention_fn",
    "packages of attention kernels": (
        "diffusers.models.attention_dispatch:_check_attention_backend_requirements"
    ),
    "attention kernels of the hub": (
        "diffusers.models.attention_dispatch:_maybe_download_kernel_for_backend"
    ),
}


def lookup(purpose: str) -> Any:
    """The object behind one entry of ``CONTRACT``. Raises ``ImportError`` naming what moved."""
    module_name, _, attribute = CONTRACT[purpose].partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        import diffusers

        raise ImportError(
            f"diffusers {diffusers.__version__} has no {CONTRACT[purpose]!r} ({purpose}); "
            "accel is tested with 0.42"
        ) from error
    return found


def weak_identity_dictionary() -> Any:
    """A dictionary that holds its keys weakly and tells them apart by identity."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def copy_into(tensor: torch.Tensor, values: Any) -> None:
    """Write into a tensor, so that whoever looks at its version sees it (``.data`` hides it)."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)


def tensor_like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values as a parameter or plain tensor, as ``tensor`` is one, which is not their storage."""
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(values.detach(), requires_grad=tensor.requires_grad)
    return values.detach().requires_grad_(tensor.requires_grad)


def is_offloaded(module: Any) -> bool:
    """Whether accelerate or diffusers moves weights of ``module`` on its own account."""
    for part in module.modules():
        hooks = getattr(vars(part).get("_diffusers_hook"), "hooks", {})
        if "_hf_hook" in vars(part) or any("offload" in name for name in hooks):
            return True
    return False


def at_rest(module: Any, name: str) -> torch.Tensor | None:
    """A parameter that accelerate keeps elsewhere between calls (sequential offloading), found by
    its name in ``module``; ``None`` if it is nowhere."""
    path, _, inner = name.rpartition(".")
    while True:  # the hook may be on any module around it
        hook = vars(module.get_submodule(path)).get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            held = getattr(each, "weights_map", None)
            if held is not None and inner in held:
                return held[inner]
        if not path:
            return None
        path, _, last = path.rpartition(".")
        inner = f"{last}.{inner}"


def adapter_state(module: Any) -> tuple[Any, ...]:
    """What an adapter's layer (peft) makes of its weights: scales, which are on, which merged."""
    names = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
    return tuple(repr(vars(module)[name]) for name in names if name in vars(module))


def adapted_layers(module: Any, adapter: str) -> list[tuple[Any, str, list[str]]]:
    """Layers (peft) that an adapter acts on, each with the attribute that says which adapters are
    on, and what that would be without this one.

    Raises:
        ValueError: it is on nowhere, or merged into the weights.
    """
    name, found = "_active_adapter", []
    for part in module.modules():
        active = getattr(part, name, None)
        on = [active] if isinstance(active, str) else list(active or ())
        if adapter not in on or adapter not in getattr(part, "scaling", {}):
            continue
        if adapter in part.merged_adapters:
            raise ValueError(f"adapter {adapter!r} is fused into the weights; unfuse_lora() first")
        if not part.disable_adapters:
            found.append((part, name, [a for a in on if a != adapter]))
    if not found:
        raise ValueError(f"no adapter {adapter!r} is on in this {type(module).__name__}")
    return found


def compiled_entry(module: Any) -> Any:
    """The module inside ``torch.compile``'s ``OptimizedModule``, or the module itself."""
    return getattr(module, "_orig_mod", module)


def compile_call(module: Any) -> tuple[str, Callable]:
    """What ``module.compile()`` would store, and under which name: to be taken away again."""
    return "_compiled_call_impl", torch.compile(module._call_impl, dynamic=False)


def is_compiled(module: Any) -> bool:
    """Whether calls of ``module`` enter one compiled graph (or several) as a whole."""
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
    return compiled_in_place or compiled_entry(module) is not module


def accelerate_state() -> list[dict[str, Any]]:
    """Where Accelerate keeps its device and precision, which are those of a process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]


def recompile_limit_hit() -> type[Exception]:
    """What a call of a ``fullgraph`` graph raises that has been made in too many variants."""
    return importlib.import_module("torch._dynamo.exc").FailOnRecompileLimitHit


def uncompiled() -> AbstractContextManager[Any]:
    """Calls inside run without the graphs that were made of them."""
    return torch.compiler.set_stance("force_eager")


def unwatched() -> AbstractContextManager[Any]:
    """Operations inside are not seen by dispatch modes that are on (a watched or counted call)."""
    return lookup("leaving dispatch modes")()


def wrapped_callable(call: Any) -> Any:
    """The callable that ``call`` was put around, or ``None``.

    accelerate and diffusers both mark it as ``__wrapped__``. diffusers' ``remove_hook`` rewires its
    chain without renewing that mark, so for its wrappers the live link is read instead.
    """
    if isinstance(call, functools.partial) and getattr(call.func, "__closure__", None):
        reference_type = lookup("links of a hook chain")
        for cell in call.func.__closure__ or ():
            if isinstance(cell.cell_contents, reference_type):
                reference = cell.cell_contents
                return reference.original_forward or reference.forward
    return getattr(call, "__wrapped__", None)


def adopt_hooks(apply: Callable[[Any], None], module: Any) -> list[tuple[Any, Any]]:
    """Run one of diffusers' ``apply_*_cache`` and take its hooks off again: ``[(module, hook)]``.

    The hooks then run as our own layers (``run_hook``), because ``HookRegistry.remove_hook`` is
    right only last-in-first-out and leaves attributes behind. ``module`` is left as it was.

    Raises:
        ValueError: a hook of the same name is on a module already (the cache is enabled).
    """
    modules = list(module.modules())
    before = [{k: vars(m)[k] for k in _HOOK_ATTRIBUTES if k in vars(m)} for m in modules]
    known = [_registry_state(b.get("_diffusers_hook")) for b in before]
    adopted: list[tuple[Any, Any]] = []
    try:
        apply(module)
        for m, (hooks, _, _) in zip(modules, known, strict=True):
            registry = vars(m).get("_diffusers_hook")
            if registry is not None:
                adopted += [(m, h) for n, h in registry.hooks.items() if n not in hooks]
    finally:
        for m, attributes, state in zip(modules, before, known, strict=True):
            for name in _HOOK_ATTRIBUTES:
                vars(m).pop(name, None)
            vars(m).update(attributes)
            registry = attributes.get("_diffusers_hook")
            if registry is not None:
                registry.hooks, registry._hook_order, registry._fn_refs = state
    return adopted


_HOOK_ATTRIBUTES = ("forward", "_diffusers_hook")


def _registry_state(registry: Any) -> tuple[dict[str, Any], list, list]:
    if registry is None:
        return {}, [], []
    return dict(registry.hooks), list(registry._hook_order), list(registry._fn_refs)


def run_hook(hook: Any, module: Any, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
    """One adopted hook around ``call_next``, as ``HookRegistry`` would run it."""
    hook.fn_ref.original_forward = call_next
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, hook.new_forward(module, *args, **kwargs))


def state_managers(hooks: list[tuple[Any, Any]]) -> list[Any]:
    """The distinct ``StateManager`` objects of adopted hooks."""
    manager_type = importlib.import_module("diffusers.hooks.hooks").StateManager
    found = {id(v): v for _, h in hooks for v in vars(h).values() if isinstance(v, manager_type)}
    return list(found.values())


@contextmanager
def branch_context(managers: list[Any], branch: str) -> Iterator[None]:
    """Tell adopted hooks which guidance branch is being computed."""
    context = lookup("name of the branch being computed")(branch)
    for manager in managers:
        manager.set_context(context)
    try:
        yield
    finally:
        for manager in managers:
            manager.set_context(None)


def has_block_metadata(block: Any) -> bool:
    """Whether diffusers knows where this block's hidden states are."""
    try:
        lookup("block metadata")(type(compiled_entry(block)))
    except ValueError:
        return False
    return True


def call_point(module: Any) -> tuple[Any, str]:
    """``(owner, attribute)`` that a call of ``module(...)`` goes through, outside compiled graphs.

    ``torch.compile(module)`` gives a wrapper whose own ``forward`` is the way in;
    ``module.compile()`` stores a compiled ``__call__`` on the instance.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        return module, "_compiled_call_impl"
    return module, "forward"


def branch_states(managers: list[Any]) -> list[Any]:
    """The per-branch state objects of adopted hooks."""
    return [state for manager in managers for state in manager._state_cache.values()]


def state_bytes(managers: list[Any]) -> tuple[int, int]:
    """Bytes of all tensors in the hooks' states: ``(on an accelerator, on the host)``."""
    tensors: dict[int, torch.Tensor] = {}

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    for state in branch_states(managers):
        collect(vars(state))
    host = sum(t.nbytes for t in tensors.values() if t.device.type == "cpu")
    return sum(t.nbytes for t in tensors.values()) - host, host


def hooked_blocks(module: Any) -> list[tuple[str, Any]]:
    """The top-level blocks that diffusers' block caches hook, in order: ``[(path, block)]``."""
    names = lookup("names of block lists")
    lists = ((n, m) for n, m in compiled_entry(module).named_children() if n in names)
    return [
        (f"{name}.{i}", block)
        for name, blocks in lists
        if isinstance(blocks, torch.nn.ModuleList)
        for i, block in enumerate(blocks)
    ]


def feed_forward_chunk(block: Any) -> int | None:
    """Tokens per call of a block's feed-forward, if chunking was enabled on it."""
    return getattr(block, "_chunk_size", None)


KERNEL_ATTRIBUTE = "_attention_backend"  # of processors that take their kernel from diffusers


def attention_kernels() -> dict[str, Any]:
    """diffusers' kernels for dense attention, by name without its leading underscore."""
    return {kernel.value.lstrip("_"): kernel for kernel in lookup("names of attention kernels")}


def attention_kernel_of(processor: Any) -> Any | None:
    """The kernel a processor attends with now; ``None``: it calls torch's attention itself."""
    if not hasattr(processor, KERNEL_ATTRIBUTE):
        return None
    chosen = getattr(processor, KERNEL_ATTRIBUTE)
    if chosen is None:
        return lookup("attention kernels").get_active_backend()[0]
    return lookup("names of attention kernels")(chosen)


def fetch_attention_kernel(kernel: Any) -> None:
    """Load what a kernel needs; those of the hub are fetched, as diffusers itself would do.

    Raises:
        RuntimeError: a package is missing; says which.
    """
    lookup("packages of attention kernels")(kernel)
    lookup("attention kernels of the hub")(kernel)


def attention_constraints(kernel: Any) -> list[Callable[..., None]]:
    """Checks of query, key and value that diffusers knows and leaves out by default."""
    return lookup("attention kernels")._constraints[kernel]


def cannot_be_spread(processor: Any, kernel: Any) -> bool:
    """Whether a processor's tokens lie on several devices, which a kernel knows nothing of."""
    spread = getattr(processor, "_parallel_config", None) is not None
    return spread and not lookup("attention kernels")._is_context_parallel_available(kernel)
