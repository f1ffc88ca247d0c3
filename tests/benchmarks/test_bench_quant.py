"""Rows of the quantisation benchmark: which are missing, controls, and what is said of parts."""

from __future__ import annotations

import pytest
import torch

from accel.artifact import Artifact, Fingerprint
from benchmarks import quant_tables
from benchmarks.bench_quant import DDPM, MODEL, NAMES, missing, shuffled, specs


@pytest.mark.parametrize("model", NAMES)
def test_every_row_has_a_name_of_its_own_and_one_way_to_be_made(model):
    labels = [spec.label for spec in specs(model)]
    assert len(set(labels)) == len(labels)
    assert all((spec.how is None) != (spec.peer is None) for spec in specs(model))
    split = [spec for spec in specs(model) if "skips" in spec.label]
    assert bool(split) == (model != MODEL)


def test_a_stopped_run_goes_on_and_named_rows_are_made_again():
    first, *others = [spec.label for spec in specs(DDPM)]
    assert [s.label for s in missing(DDPM, [], {first})] == others
    assert [s.label for s in missing(DDPM, [first], ())] == [first]
    assert list(missing(DDPM, [first], {first})) == []
    with pytest.raises(ValueError, match="no row is called 'W3A8'"):
        list(missing(DDPM, ["W3A8"], ()))


def test_a_shuffled_artifact_has_the_same_scales_elsewhere():
    scales = torch.arange(1, 65, dtype=torch.int32)
    tensors = {
        "a:q": torch.ones(64, 2, dtype=torch.int8),
        "a:wscale": scales,
        **{f"{n}:ascale": torch.tensor([i]) for i, n in enumerate("abcdef")},
        **{f"{n}:azero": torch.tensor([10 + i]) for i, n in enumerate("abcdef")},
    }
    given = Artifact("m", Fingerprint("A", "0", {}), dict(tensors))
    made = shuffled(given).tensors
    assert torch.equal(given.tensors["a:wscale"], scales)  # not in place
    assert not torch.equal(made["a:wscale"], scales)
    assert torch.equal(made["a:wscale"].sort().values, scales)
    for n in "abcdef":
        assert int(made[f"{n}:azero"]) == 10 + int(made[f"{n}:ascale"])  # they move together
    assert any(int(made[f"{n}:ascale"]) != i for i, n in enumerate("abcdef"))


def _row(psnr, seconds=1.0):
    mean = sum(psnr) / len(psnr)
    return {
        "psnr": {"estimate": mean, "low": mean, "high": mean},
        "per_sample": {"psnr": psnr},
        "facts": {
            "calibration_seconds": seconds,
            "quantised_layers": 2,
            "layers_by_bits": {"4": 2},
            "temporal_error": 0.5,
            "bytes_on_disk": [100, 40],
        },
    }


def test_parts_are_told_by_paired_differences():
    base = [20.0 + i for i in range(12)]
    noise = [0.5 if i % 2 else -0.5 for i in range(12)]
    result = {
        "rows": {
            "W4A8: plain": _row(base, 40.0),
            "W4A8: + temporal whole": _row(
                [x + 1 + n / 10 for x, n in zip(base, noise, strict=True)]
            ),
            "W4A8: + scales by timestep": _row(
                [x + 1 + n for x, n in zip(base, noise, strict=True)]
            ),
            "W4A8: GPTQ": _row(base, 5.0),
            "W4A8: AdaRound, one scale": _row(
                [x - 3 - n for x, n in zip(base, noise, strict=True)], 20.0
            ),
        }
    }
    told = {
        line.split(" | ")[0].strip("| "): line
        for line in quant_tables.parts(result).split("\n")[2:]
    }
    assert told["temporal modules whole"].endswith("| yes |")
    assert told["static scales by timestep"].endswith("| no |")
    assert told["AdaRound for rounding to the nearest"].endswith("| harms |")
    assert "4.0x" in quant_tables.cost(result)
    assert "2 (2 in 4)" in quant_tables.facts(result)
    assert quant_tables.parts({"rows": {}}) == ""
