"""Triton launches on the current device, which need not be the one of its tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import triton_backward, triton_forward, triton_select

several_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LAUNCHED = {
    triton_forward: ("forward",),
    triton_backward: ("backward_q", "backward_kv"),
    triton_select: ("means", "mass", "lists"),
}


def everything(device):
    """Every kernel once."""
    r = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=r).to(device).requires_grad_() for _ in "qkv")
    with torch.no_grad():
        mass = triton_select.subblock_mass(q, k, (32, 32), 4)
        keep = mass >= 0  # all of them
        listed = triton_select.listed(keep)
    blocks = BlockMap(keep, 32, 32, 64, 64)
    out = triton_backward.attend(q, k, v, blocks).out
    out.square().sum().backward()
    return [mass, *listed, out.detach(), q.grad, k.grad, v.grad]


def test_every_launch_is_made_where_its_tensors_are(made_current, monkeypatch):
    launched = []

    class Kernel:
        def __init__(self, name, current):
            self.name, self.current = name, current

        def __getitem__(self, grid):
            def launch(tensor, *args, **options):
                assert self.current == [tensor.device]
                assert options["enable_fp_fusion"]
                launched.append(self.name)

            return launch

    for module, names in LAUNCHED.items():
        current = made_current(module)
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name, current))
    everything("cpu")
    assert set(launched) == {name for names in LAUNCHED.values() for name in names}


@several_gpus
def test_another_gpu_than_the_current_one_computes_the_same():
    for here, there in zip(everything("cuda:0"), everything("cuda:1"), strict=True):
        assert torch.equal(here.cpu(), there.cpu())
