"""Attention processors that keep a family's own behaviour and can attend to kept blocks only.

Each holds the processor it replaces and calls it wherever attention is dense, so the dense kernel,
masks and backends are the user's. Where attention is sparse, q, k and v are made as that processor
makes them: these are the only copies of host code here, proved bit-equal by tests, and
``tests/sparse_attn/processors`` fails by name when the host's source moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_attn.processors.cogvideox import CogVideoXProcessor, FusedCogVideoXProcessor
from sparse_attn.processors.flux import FluxProcessor
from sparse_attn.processors.hunyuanvideo import HunyuanVideoProcessor
from sparse_attn.processors.ltx import LTXProcessor
from sparse_attn.processors.wan import WanProcessor

if TYPE_CHECKING:
    from sparse_attn.processors.site import Site


# How a model class is served: the processor classes that are replaced, by name, and by what.
Family = dict[str, Any]
FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": {"WanAttnProcessor": WanProcessor},
    "CogVideoXTransformer3DModel": {
        "CogVideoXAttnProcessor2_0": CogVideoXProcessor,
        "FusedCogVideoXAttnProcessor2_0": FusedCogVideoXProcessor,
    },
    "HunyuanVideoTransformer3DModel": {"HunyuanVideoAttnProcessor2_0": HunyuanVideoProcessor},
    "LTXVideoTransformer3DModel": {"LTXVideoAttnProcessor": LTXProcessor},
    "FluxTransformer2DModel": {"FluxAttnProcessor": FluxProcessor},
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
    if found not in family:
        raise ValueError(
            f"sparse attention: {path} of {cls} has a {found}; only {' and '.join(family)} can be "
            "replaced. Attach before other processors are set, or set the stock one again"
        )
    return family[found](stock, site)
