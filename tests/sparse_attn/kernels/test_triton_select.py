"""Selection on a GPU, in the interpreter where there is none, against plain operations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn import estimators
from sparse_attn.block_map import BlockMap, block_mean_squares, block_means
from sparse_attn.kernels import dispatch, triton_select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter
# Products of means are in TF32 on a GPU: 10 bits.
CLOSE = {"rtol": 1e-2, "atol": 1e-4} if DEVICE == "cuda" else {"rtol": 1e-5, "atol": 1e-6}


def sample(s, heads, d, seed, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return torch.randn(2, s, heads, d, generator=r).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("block", [1, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_are_those_of_plain_operations(block, dtype):
    x = sample(150, 3, 24, 0, dtype)
    found = triton_select.block_means(x.to(DEVICE), block).cpu()
    torch.testing.assert_close(found, block_means(x, block))
    found = triton_select.block_means(x.to(DEVICE), block, squares=True).cpu()
    torch.testing.assert_close(found, block_mean_squares(x, block))


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "d", "blocks"),
    [
        (200, 333, 4, 2, 32, (32, 16)),  # ragged on both sides, grouped heads, several tiles
        (130, 70, 2, 2, 24, (64, 32)),  # short blocks lack whole parts
        (16, 5, 1, 1, 16, (16, 16)),
    ],
)
def test_mass_is_that_of_plain_operations(queries, keys, heads, groups, d, blocks):
    q, k = sample(queries, heads, d, 1), sample(keys, groups, d, 2)
    found = triton_select.subblock_mass(q.to(DEVICE), k.to(DEVICE), blocks, 4).cpu()
    torch.testing.assert_close(found, estimators.subblock_mass(q, k, blocks), **CLOSE)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]), **CLOSE)


def test_what_does_not_fit_a_tile_is_left_to_plain_operations(monkeypatch):
    """Asked of the meta device, as of a GPU."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("meta",))

    def selects(d, *how):
        return dispatch.selects(torch.empty(1, 1, 1024, d, device="meta"), *how)

    assert selects(128, 256)
    assert selects(128, 1024, 4)
    assert not selects(160, 64)  # shared memory of small parts
    assert not selects(64, 512)  # registers
    assert not selects(64, 48)
    assert not dispatch.selects(torch.empty(1, 1, 64, 64), 64)
    wanted = torch.empty(1, 1, 64, 64, device="meta", requires_grad=True)
    assert not dispatch.selects(wanted, 64)
    with torch.no_grad():
        assert dispatch.selects(wanted, 64)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lists_are_those_of_a_sort(share):
    keep = torch.rand(2, 3, 5, 37, generator=torch.Generator().manual_seed(3)) < share
    blocks = BlockMap(keep, 16, 16, 5 * 16, 37 * 16 - 4)
    lists, counts = triton_select.listed(keep.to(DEVICE))
    assert torch.equal(lists.cpu(), blocks.lists())
    assert torch.equal(counts.cpu(), blocks.counts)
