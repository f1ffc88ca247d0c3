"""The Triton kernel in the interpreter, or on a GPU where there is one, against float64."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn.block_map import BlockMap
from sparse_attn.kernels import dispatch, triton_forward
from sparse_attn.kernels.launch import Config, padded
from sparse_attn.kernels.reference import Pooled
from sparse_attn.kernels.triton_forward import config_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter
TYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# The interpreter multiplies bit patterns of bfloat16, so that type needs a GPU.


def run(attention, config, dtype, with_pooled, **shape):
    q, k, v, blocks = attention.problem(dtype=dtype, **shape)
    pooled = attention.pooled_of(k, v, blocks) if with_pooled else None
    exact = attention.exact(q, k, v, blocks, pooled)
    there = BlockMap(
        blocks.keep.to(DEVICE), blocks.query_block, blocks.key_block, blocks.queries, blocks.keys
    )
    moved = None if pooled is None else Pooled(*(x.to(DEVICE) for x in pooled))
    found = triton_forward.attend(*(x.to(DEVICE) for x in (q, k, v)), there, moved, config=config)
    assert found.out.dtype == dtype
    assert found.out.stride() == q.stride()  # as the host has it
    error = (found.out.cpu().double() - exact.out).abs().max().item()
    assert error <= attention.budget(q, k, v, blocks, pooled)
    empty = exact.lse == -math.inf
    assert torch.equal(found.lse.cpu() == -math.inf, empty)
    error = (found.lse.cpu().double() - exact.lse)[~empty].abs().max().item()
    assert error <= 1e-5  # float32 sums of at most 200 terms


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("with_pooled", [False, True])
def test_error_is_within_the_budget(attention, dtype, with_pooled):
    run(attention, Config(32, 32, 4, 2), dtype, with_pooled, n=70, m=75, h=2, g=1)


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (Config(16, 64, 4, 2), (32, 16)),  # several blocks of keys in one tile
        (Config(64, 16, 4, 2), (32, 32)),  # several tiles in one block; a tile above a block
    ],
)
def test_tiles_and_blocks_need_not_agree(attention, config, blocks):
    run(attention, config, torch.float32, True, n=70, m=75, h=2, g=2, blocks=blocks)


@pytest.mark.parametrize(("width", "blocks"), [(16, (32, 16)), (24, (32, 32))])
@pytest.mark.parametrize("with_pooled", [False, True])
def test_keys_through_descriptors(attention, width, blocks, with_pooled):
    config = Config(32, 16, 4, 2, described=True)
    shape = {"n": 70, "m": 75, "h": 2, "g": 1, "d": width}
    run(attention, config, torch.float32, with_pooled, blocks=blocks, **shape)


def test_strides_that_descriptors_can_not_have_are_read_by_pointers(attention):
    """Rows of 24 of 25 numbers lie 100 bytes apart; descriptors want multiples of 16."""
    q, k, v, blocks = attention.problem(d=24)
    wide = torch.cat([k, k[..., :1]], -1).to(DEVICE)
    odd = wide[..., :24]
    assert not triton_forward.describable(odd)
    config = Config(32, 16, 4, 2, described=True)
    found = triton_forward.attend(
        *(x.to(DEVICE) for x in (q, odd, v)),  # a copy would have other strides
        BlockMap(blocks.keep.to(DEVICE), 32, 16, blocks.queries, blocks.keys),
        config=config,
    )
    right = attention.exact(q, k, v, blocks).out
    error = (found.out.cpu().double() - right).abs().max().item()
    assert error <= attention.budget(q, k, v, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("tiles", [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("with_pooled", [False, True])
def test_head_sizes_and_tiles_of_the_table(attention, dtype, width, tiles, with_pooled):
    config = Config(*tiles, 4, 2)
    run(attention, config, dtype, with_pooled, n=200, m=150, d=width, h=2, g=1, blocks=(128, 64))


def test_a_head_size_is_filled_up(attention):
    run(attention, Config(32, 32, 4, 2), torch.float32, False, n=40, m=40, d=24, h=2, g=2)
    with pytest.raises(ValueError, match="512"):
        padded(512)


def test_every_known_part_has_a_configuration():
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (7, 5), (0, 0)]:
        for width in (16, 64, 128, 256):
            config = config_for(capability, width, torch.bfloat16)
            assert config.block_m & (config.block_m - 1) == 0
            assert config.block_n >= 16


def test_the_dispatcher_says_what_is_missing(monkeypatch):
    assert dispatch.kernel_for("cuda") == "triton"
    assert dispatch.kernel_for("cpu") == "cpu"
    with pytest.raises(ValueError, match="mps"):
        dispatch.kernel_for("mps")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        dispatch.kernel_for("cuda")


def compiled(*cases, by="compiled(*case)"):
    """In a fresh process without the interpreter; cases (kernel, part, head[, pooled])."""
    code = (
        "import json, sys; from sparse_attn.kernels.compile_only import *\n"
        f"found = [{by} for case in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[c.spilled, c.shared, c.problems()] for c in found]))"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_compiles_for_hopper_as_the_first_call_of_a_process():
    ((_, shared, problems),) = compiled(("forward", 90, 64))
    assert problems == []
    assert shared > 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
@pytest.mark.parametrize("part", [80, 86, 89, 90, 100, 120])
def test_compiles_without_spills_for_every_part(kernel, part):
    """Every head size, with pooled keys and without."""
    cases = [(kernel, part, head, pooled) for head in (64, 96, 128) for pooled in (True, False)]
    found = compiled(*cases)
    assert {case: problems for case, (*_, problems) in zip(cases, found, strict=True)} == {
        case: [] for case in cases
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", [80, 86, 89, 90, 100, 120])
def test_selection_compiles_without_spills_for_every_part(part):
    cases = [("lists", part, 64)]
    cases += [(kernel, part, head) for head in (64, 96, 128) for kernel in ("means", "mass")]
    found = compiled(*cases, by="selection(*case)")
    assert {case: problems for case, (*_, problems) in zip(cases, found, strict=True)} == {
        case: [] for case in cases
    }
    assert max(head for _, _, head in cases) == dispatch.MOST_WIDE


@pytest.mark.slow
def test_keys_through_descriptors_compile():
    config = "Config(128, 64, 8, 3, described=True)"
    found = compiled(64, 96, 128, by=f"compiled('forward', 90, case, config={config})")
    assert [problems for *_, problems in found] == [[], [], []]
