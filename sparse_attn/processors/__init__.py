"""Attention processors that keep a family's own behaviour and can attend to kept blocks only.

Each holds the processor it replaces and calls it wherever attention is dense, so the dense kernel,
masks and backends are the user's. Where attention is sparse, q, k and v are made as that processor
makes them: these are the only copies of host code here, proved bit-equal by tests, and
``tests/sparse_attn/processors`` fails by name when the host's source moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_attn.processors.cogvideox import CogVideoXProcessor
from sparse_attn.processors.flux import FluxProcessor
from sparse_attn.processors.hunyuanvideo import HunyuanVideoProcessor
from sparse_attn.processors.ltx import LTXProcessor
from sparse_attn.processors.wan import WanProcessor

if TYPE_CHECKING:
    from sparse_attn.processors.site import Site


class Family(NamedTuple):
    """How a model class is served. stock: name of the only processor class that is replaced."""

    processor: Any
    stock: str


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family(WanProcessor, "WanAttnProcessor"),
    "CogVideoXTransformer3DModel": Family(CogVideoXProcessor, "CogVideoXAttnProcessor2_0"),
    "HunyuanVideoTransformer3DModel": Family(HunyuanVideoProcessor, "HunyuanVideoAttnProcessor2_0"),
    "LTXVideoTransformer3DModel": Family(LTXProcessor, "LTXVideoAttnProcessor"),
    "FluxTransformer2DModel": Family(FluxProcessor, "FluxAttnProcessor"),
}


def family_of(cls: str) -> Family:
    """Raises ValueError for a model class that has no processor here."""
    if cls not in FAMILIES:
        raise ValueError(
            f"sparse attention: {cls} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[cls]


def processor_for(cls: str, path: str, stock: Any, site: Site) -> Any:
    """The processor that stands for `stock`, of the attention at `path`.

    Raises ValueError where that is not the family's own one, which nobody can stand in for.
    """
    family = family_of(cls)
    found = type(stock).__name__
    if found != family.stock:
        raise ValueError(
            f"sparse attention: {path} of {cls} has a {found}; only {family.stock} can be "
            "replaced. Attach before other processors are set, or set the stock one again"
        )
    return family.processor(stock, site)
