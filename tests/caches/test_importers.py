"""Schedules of other projects: what is read is what they say, and what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import PNDMScheduler

from accel.denoiser import denoisers
from accel.method import attached
from accel.testing import tiny
from caches.evolution import EvolutionCache
from caches.importers import ecad, harmonica, intervals, key_steps, per_column, step_mask
from caches.schedule import module_columns

COLUMNS = ("transformer.a", "transformer.b")


def _ecad(folder, steps, blocks, parts):
    table = {
        f"{s:03d}": {str(b): dict.fromkeys(parts, (s + b) % 2 == 0) for b in range(blocks)}
        for s in range(steps)
    }
    return _written(folder, table, num_blocks=blocks)


def _written(folder, table, **more):
    file = folder / "schedule.json"
    file.write_text(json.dumps({"cache_schedule": {"schedule": table, **more}, "config": {}}))
    return file


@pytest.mark.parametrize(
    ("pipeline", "parts"), [("pixart", ("attn1", "attn2", "ff")), ("dit", ("attn1", "ff"))]
)
def test_ecad(pipeline, parts, tmp_path):
    (denoiser,) = denoisers(tiny(pipeline).pipe)
    blocks = len(denoiser.blocks)
    found = ecad(_ecad(tmp_path, 4, blocks, parts), denoiser)
    assert found.columns == module_columns(denoiser)
    assert found.steps == 4
    width = len(parts)
    assert found.rows[0][:width] == "C" * width
    assert found.rows[1][:width] == "R" * width  # block 0 repeats in step 1
    assert found.rows[1][width : 2 * width] == "C" * width
    assert found.rows[0] == "C" * len(found.columns)  # nothing to repeat yet


def test_ecad_names_what_is_wrong(tmp_path):
    (denoiser,) = denoisers(tiny("dit").pipe)
    with pytest.raises(ValueError, match="a block 3"):
        ecad(_ecad(tmp_path, 2, 40, ("ff",)), denoiser)
    with pytest.raises(ValueError, match="unknown component 'conv'"):
        ecad(_ecad(tmp_path, 2, 1, ("conv",)), denoiser)
    with pytest.raises(ValueError, match=r"has no .*attn2"):
        ecad(_ecad(tmp_path, 2, 1, ("attn2",)), denoiser)
    with pytest.raises(ValueError, match="a block -1"):
        ecad(_written(tmp_path, {"0": {"-1": {"ff": True}}}), denoiser)
    for table in ([1], {"0": [1]}, {"0": {"0": True}}, {"0": {"x": {"ff": True}}}):
        with pytest.raises(ValueError, match="not an ECAD schedule"):
            ecad(_written(tmp_path, table), denoiser)


@pytest.mark.parametrize("pipeline", ["dit", "sd", "flux"])
def test_an_imported_schedule_runs(pipeline, tmp_path):
    """At the steps it says, of the noise levels that the pipeline's calls have."""
    host = tiny(pipeline)
    (denoiser,) = denoisers(host.pipe)
    schedule, call = key_steps((0, 2), 4, (denoiser.slot,)), None
    if pipeline == "flux":
        with pytest.raises(ValueError, match="depend on a call"):
            EvolutionCache.of(schedule, host.pipe, tmp_path / "s")
        call = {k: v for k, v in host.inputs.items() if k not in ("generator", "output_type")}
    method = EvolutionCache.of(schedule, host.pipe, tmp_path / "s", call)
    with attached(method, host.pipe) as live:
        host.run(num_inference_steps=4)
        (report,) = live.report()["runs"]
    assert report["detail"] == {}
    assert report["computed"] == report["reused"] == 2


def test_a_scheduler_that_adds_steps_runs_no_imported_schedule(tmp_path):
    host = tiny("sd")
    host.pipe.scheduler = PNDMScheduler.from_config(host.pipe.scheduler.config, skip_prk_steps=True)
    with pytest.raises(ValueError, match="of 4 steps, of which PNDMScheduler makes 5"):
        EvolutionCache.of(key_steps((0, 2), 4, ("unet",)), host.pipe, tmp_path / "s")


def test_harmonicas_last_row_is_the_first_step():
    logits = torch.tensor([[5.0, -5.0], [-5.0, 5.0], [5.0, 5.0]])
    assert harmonica(logits, COLUMNS).rows == ("CC", "RC", "CR")
    with pytest.raises(ValueError, match=r"\(3, 2\) for 1 columns"):
        harmonica(logits, COLUMNS[:1])


def test_masks_intervals_and_keys():
    assert step_mask("1001", COLUMNS).rows == ("CC", "RR", "RR", "CC")
    assert step_mask([0, 1], COLUMNS).rows == ("CC", "CC")  # the first step has nothing to repeat
    assert intervals((1, 2), COLUMNS).rows == ("CC", "RR", "CC", "RR", "RR")
    assert key_steps((0, 2), 3, COLUMNS).rows == ("CC", "RR", "CC")
    assert per_column({"t.a": (0, 1), "t.b": (0,)}, 3).rows == ("CC", "CR", "RR")
    for mask in ("12", "10x"):
        with pytest.raises(ValueError, match="ones and zeros"):
            step_mask(mask, COLUMNS)
    with pytest.raises(ValueError, match="0 or more"):
        intervals((1, -1), COLUMNS)
    with pytest.raises(ValueError, match=r"\[7\] are no steps"):
        key_steps((0, 7), 5, COLUMNS)
    with pytest.raises(ValueError, match=r"\[7\] are no steps"):
        per_column({"t.a": (0, 7)}, 5)
