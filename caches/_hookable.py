"""What feature caches can go on, and which claims that makes."""

from __future__ import annotations

from typing import Any

from accel import compat
from accel.denoiser import Denoiser, chunked_feed_forward, denoisers
from accel.method import Claim


def last_projection(denoiser: Denoiser) -> str:
    """Path of the linear layer behind the last block.

    diffusers' own "lite" mode looks for "proj_out" alone: on DiT it then skips every block and
    extrapolates nothing.
    """
    for name in ("proj_out", "proj_out_2"):
        if hasattr(denoiser.module, name):
            return name
    raise ValueError(
        f"TaylorSeer(modules='lite') knows no last projection of {denoiser.cls}; "
        "use modules='attention+ff'"
    )


def require_whole_feed_forwards(denoiser: Denoiser, method: str) -> None:
    """For caches of modules: ValueError where a feed-forward runs in chunks, several calls a step.

    A block decides that, not its feed-forward, so the whole denoiser is looked at.
    """
    if chunked_feed_forward(denoiser.module):
        raise ValueError(
            f"{method}: {denoiser.cls} runs its feed-forwards in chunks; "
            "switch chunking off to cache"
        )


def call_claim(pipe: Any) -> Claim:
    """The claim on the calls of all denoisers."""
    return ("denoiser.call", frozenset(d.slot for d in denoisers(pipe)))


def block_claims(pipe: Any, method: str) -> frozenset[Claim]:
    """Claims on whole blocks, or ``ValueError`` where diffusers' block caches cannot work."""
    paths: set[str] = set()
    for denoiser in denoisers(pipe):
        top = compat.hooked_blocks(denoiser.module)
        if not top:
            raise ValueError(
                f"{method} needs a list of transformer blocks; {denoiser.cls} has none. "
                "Choose a transformer pipeline, or a cache made for UNets"
            )
        for path, block in top:
            if not compat.has_block_metadata(block):
                raise ValueError(
                    f"{method}: diffusers does not know {type(block).__name__} of {denoiser.cls}; "
                    "use TaylorSeer(modules='attention+ff')"
                )
            paths.add(f"{denoiser.slot}.{path}")
        if method != "MagCache" and getattr(top[-1][1], "context_pre_only", False):
            raise ValueError(
                f"{method}: the last block of {denoiser.cls} returns no text stream, which "
                "diffusers' implementation cannot handle; use MagCache or TaylorSeer"
            )
    return frozenset({("block.skip", frozenset(paths)), call_claim(pipe)})
