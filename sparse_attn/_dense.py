"""Dense attention by one of the host's kernels: where it is set, whether it works, what it did."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from accel import compat
from accel.patch import Patch
from sparse_attn.processors.site import SparseProcessor

TRIAL_TOKENS = 128
# Relative error (L2) of attention over normally distributed q, k and v. 8-bit products err by 1 to
# 3 %, what is computed wrongly by about 100 %.
MOST_ERROR = 0.2
# What kernels and the code around them raise where they refuse an input.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, OSError)


def attend_by(
    kernel: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **more: Any,
) -> Tensor:  # fmt: skip
    """torch's attention, (b, h, s, d), by one of diffusers' kernels, which want (b, s, h, d)."""
    dispatch = compat.lookup("attention by a kernel")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = dispatch(q, k, v, attn_mask, dropout_p, is_causal, backend=kernel, **more)
    return out.transpose(1, 2)


def refusal(kernel: Any, heads: int, width: int, like: Tensor) -> str | None:
    """Why a kernel cannot attend with `heads` heads of `width` in the type and on the device of
    `like`; None where a trial gives what torch's attention gives."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, TRIAL_TOKENS, width, generator=g).to(like) for _ in "qkv")
    try:
        compat.fetch_attention_kernel(kernel)
        seen = {"query": q.transpose(1, 2), "key": k.transpose(1, 2), "value": v.transpose(1, 2)}
        for check in compat.attention_constraints(kernel):
            check(**seen, attn_mask=None, is_causal=False)
        with torch.no_grad():
            found = attend_by(kernel, q, k, v).float()
    except REFUSALS as error:
        return in_a_line(error)
    right = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    error = ((found - right).norm() / right.norm()).item()
    if not error <= MOST_ERROR:  # nan is not
        return f"it is wrong by {error:.0%} on a trial of {heads} heads of {width}"
    return None


def in_a_line(error: BaseException) -> str:
    """What an error says, the same each time; compilers say pages, and where their objects are."""
    said = textwrap.shorten(re.sub(r" at 0x[0-9a-f]+", "", str(error)), 300, placeholder=" ...")
    return said.rstrip(".") or type(error).__name__


def fault(out: Tensor, frames: int = 2) -> str | None:
    """What is wrong with a denoiser's output (b, ...), or None; one read from its device.

    frames: axis of the frames, if it has five.
    """
    x = out.movedim(frames, 1).flatten(0, 1) if out.ndim == 5 else out
    x = x.flatten(1)  # (samples or frames, values)
    blank = (x.amax(1) == x.amin(1)).any() & (x.shape[1] > 1)
    infinite, blank = torch.stack([~x.isfinite().all(), blank]).tolist()
    if infinite:
        return "values that are not finite"
    return "a frame without any variation" if blank else None


@dataclass(eq=False)
class Attention:
    """One attention of a denoiser, and what is swapped there in a run."""

    path: str
    module: Any
    patch: Patch = field(default_factory=Patch)
    in_graph: bool = False  # compiled
    left: bool = False  # to the host's kernel, in this run

    @property
    def processor(self) -> Any:
        """The host's own, which a sparse policy may stand before."""
        found = self.module.processor
        return found.stock if isinstance(found, SparseProcessor) else found

    @property
    def direct(self) -> bool:
        """Whether it calls torch's attention itself."""
        return compat.attention_kernel_of(self.processor) is None

    @property
    def taken(self) -> int:
        """Calls that a sparse policy has answered."""
        found = self.module.processor
        return found.site.taken if isinstance(found, SparseProcessor) else 0

    @property
    def shape(self) -> tuple[int, int]:
        """Heads and their width; (1, 64) where the module does not say."""
        heads, inner = (getattr(self.module, name, 0) for name in ("heads", "inner_dim"))
        return (heads, inner // heads) if heads and inner else (1, 64)


def attentions(module: Any) -> list[Attention]:
    """All of a model that have a processor."""
    found = ((p, m) for p, m in module.named_modules() if getattr(m, "processor", None) is not None)
    return [Attention(path, m) for path, m in found]


def compiled_paths(module: Any) -> list[str]:
    """Beginnings of the paths that lie in compiled graphs; "" is all of them."""
    if compat.is_compiled(module):
        return [""]
    return [f"{p}." for p, part in module.named_modules() if p and compat.is_compiled(part)]


class Rerouted(TorchFunctionMode):
    """Gives torch's attention to a kernel, for processors that call it themselves."""

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.kernel, self.calls = kernel, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return attend_by(self.kernel, *args, **(kwargs or {}))


class Names(TorchDispatchMode):
    """Notes the operators that attend."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.softmax = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]  # "aten._scaled_dot_product_flash_attention"
        if "att" in name.lower():
            self.found[name] += 1
        self.softmax += "softmax" in name
        return func(*args, **(kwargs or {}))

    def counted(self, otherwise: str) -> Counter[str]:
        """torch's "math" has no operator of its own; some packages have none at all."""
        if self.found:
            return self.found
        return Counter({"products and softmax" if self.softmax else otherwise: 1})
