"""Each processor makes q, k, v and the rest as the one it stands for, bit for bit.

And the copies of host code fail here by name when the host's source moves.
"""

from __future__ import annotations

import hashlib
import inspect

import pytest
import torch

from accel import compat
from accel.denoiser import denoisers
from accel.patch import Patch
from accel.testing import assert_equal, tiny
from sparse_attn._graphs import attend_as_host
from sparse_attn.processors import FAMILIES, processor_for

PIPELINES = {
    "wan": "WanTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
    "hunyuanvideo": "HunyuanVideoTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "flux": "FluxTransformer2DModel",
}
# Of the stock processor's __call__ in diffusers 0.42.1.
SOURCES = {
    "WanAttnProcessor": "13c09feedcfe814a",
    "CogVideoXAttnProcessor2_0": "a1ecc57eaf6a958b",
    "FusedCogVideoXAttnProcessor2_0": "5a1c50f8bf400f0e",
    "HunyuanVideoAttnProcessor2_0": "9d2e9a44e1dc2bf7",
    "LTXVideoAttnProcessor": "cac2aabbea3a63db",
    "FluxAttnProcessor": "d5b36134887ebe45",
}


class _HostKernel:
    """A site that attends as the host's processor does, through the code of ours."""

    def __init__(self, stock):
        self.stock, self.taken = stock, 0

    def sparse(self):
        self.taken += 1
        return self.attend

    def attend(self, q, k, v):
        return attend_as_host(self.stock, q, k, v)


def replaced(host, patch):
    """All self-attentions through our processors."""
    sites = []
    for denoiser in denoisers(host.pipe):
        for block in denoiser.blocks:
            module = denoiser.module.get_submodule(block.self_attn)
            sites.append(site := _HostKernel(module.processor))
            ours = processor_for(denoiser.cls, block.self_attn, module.processor, site)
            patch.swap(module, "processor", ours)
    return sites


@pytest.mark.parametrize("pipeline", list(PIPELINES))
@pytest.mark.parametrize("fused", [False, True])
def test_bit_equal_to_the_stock_processor(pipeline, fused):
    host = tiny(pipeline)
    if fused:  # HunyuanVideo and LTX go on with the single ones
        host.pipe.transformer.fuse_qkv_projections()
    if pipeline == "hunyuanvideo":  # no padding: a mask of ones, which has a kernel of its own
        host.inputs["negative_prompt_attention_mask"] = torch.ones(1, 7)
    plain, patch = host.run(), Patch()
    sites = replaced(host, patch)
    found = host.run()
    patch.undo()
    assert all(site.taken for site in sites)
    if pipeline == "hunyuanvideo":
        assert (found - plain).abs().max().item() < 1e-5
    else:
        assert_equal(plain, found, "output through our processors")


@pytest.mark.parametrize("pipeline", ["wan", "cogvideox"])
def test_bit_equal_whatever_the_default_of_the_process_is(pipeline):
    """Wan's processor follows the default, CogVideoX's calls torch's attention in any case."""
    registry = compat.lookup("attention kernels")
    before = registry.get_active_backend()[0]
    host = tiny(pipeline)
    native = host.run()
    try:
        registry.set_active_backend(compat.attention_kernels()["native_math"])
        plain, patch = host.run(), Patch()
        replaced(host, patch)
        assert_equal(plain, host.run(), "output through our processors")
        patch.undo()
    finally:
        registry.set_active_backend(before)
    assert torch.equal(plain, native) == (pipeline == "cogvideox")


@pytest.mark.parametrize("name", [name for family in FAMILIES.values() for name in family])
def test_the_hosts_source_is_the_one_that_was_copied(name):
    import diffusers.models.attention_processor as shared
    from diffusers.models.transformers import (
        transformer_flux,
        transformer_hunyuan_video,
        transformer_ltx,
        transformer_wan,
    )

    modules = (shared, transformer_wan, transformer_ltx, transformer_flux)
    found = next(vars(m)[name] for m in (*modules, transformer_hunyuan_video) if name in vars(m))
    source = inspect.getsource(found.__call__)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert digest == SOURCES[name], f"{name}.__call__ has changed: compare it with our copy"
