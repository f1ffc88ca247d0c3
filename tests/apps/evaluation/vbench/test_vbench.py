"""VBench's prompts, names, constants and weights; a run from plan to score on a tiny model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from apps.commands.vbench import lines
from apps.evaluation.vbench import folder as vbench
from apps.evaluation.vbench.folder import Plan, check, generate, run_official, save_plan, score
from apps.evaluation.vbench.native import native
from apps.evaluation.vbench.score import RANGES, WEIGHTS, by_prompt, totals
from apps.evaluation.vbench.suite import DIMENSIONS, QUALITY, SEMANTIC, read_suite

ROWS = [
    {"prompt_en": "a person, running", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "a still bowl", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a café (small), it's old", "dimension": ["scene"]},
    {"prompt_en": "a still bowl", "dimension": ["color"]},  # VBench, too, has prompts twice
]


@pytest.fixture
def suite_file(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(ROWS), "utf-8")
    return path


@pytest.fixture(scope="session")
def video_model(tmp_path_factory):
    from diffusers import WanPipeline

    from accel.tiny import tiny
    from accel.zoo.wan_text import TextConfig, build_tokenizer

    parts = tiny("wan").pipe.components
    text = TextConfig(width=parts["transformer"].config.text_dim, heads=4, layers=1).build()
    pipe = WanPipeline(
        build_tokenizer(), text, parts["vae"], parts["scheduler"], parts["transformer"]
    )
    folder = tmp_path_factory.mktemp("models") / "wan"
    pipe.save_pretrained(str(folder))
    return str(folder)


def test_the_suite_asks_for_each_video_once_under_its_official_name(suite_file):
    videos = read_suite(suite_file).videos()
    names = [v.name for v in videos]
    assert len(names) == len(set(names)) == 5 + 25 + 5
    assert "a person, running-0.mp4" in names
    assert "a still bowl-24.mp4" in names
    assert "a café (small), it's old-4.mp4" in names
    bowl = [v for v in videos if v.prompt == "a still bowl"]
    assert bowl[0].dimensions == ("temporal_flickering", "color")
    assert bowl[5].dimensions == ("temporal_flickering",)
    assert len({v.seed for v in videos}) == len(videos)


def test_a_part_is_spread_over_the_suite(suite_file):
    suite = read_suite(suite_file)
    few = suite.videos(["color"], indices=2)
    assert [v.name for v in few] == ["a still bowl-0.mp4", "a still bowl-1.mp4"]
    assert len(suite.videos(indices=1, flicker_indices=1, prompts=1)) == 3
    with pytest.raises(ValueError, match="fame"):
        suite.videos(["fame"])


@pytest.mark.parametrize(
    "text", ["[]", "{", '[{"prompt": 1}]', '[{"prompt_en": "a/b", "dimension": []}]']
)
def test_what_is_no_suite_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_suite(path)


def test_constants_cover_all_dimensions_and_weights_are_those_of_the_leaderboard():
    assert set(RANGES) == set(WEIGHTS) == set(DIMENSIONS)
    assert (len(QUALITY), len(SEMANTIC)) == (7, 9)
    assert sum(WEIGHTS[d] for d in QUALITY) == 6.5
    best = totals({d: high for d, (_, high) in RANGES.items()})
    worst = totals({d: low for d, (low, _) in RANGES.items()})
    assert (best["quality"], best["semantic"], best["total"]) == (100, 100, 100)
    assert (worst["quality"], worst["semantic"], worst["total"]) == (0, 0, 0)
    assert not best["partial"]


@pytest.mark.parametrize(
    ("dimension", "points"),
    [  # what 0.01 of the raw score is worth in the total, from the formula by hand
        ("subject_consistency", 0.144), ("temporal_flickering", 0.332),
        ("motion_smoothness", 0.422), ("dynamic_degree", 0.062), ("object_class", 0.022),
        ("appearance_style", 0.078), ("temporal_style", 0.061),
    ],
)  # fmt: skip
def test_a_hundredth_is_worth_what_it_should(dimension, points):
    middle = {d: (low + high) / 2 for d, (low, high) in RANGES.items()}
    more = totals({**middle, dimension: middle[dimension] + 0.01})
    assert more["total"] - totals(middle)["total"] == pytest.approx(points, abs=6e-4)


def test_a_missing_dimension_makes_a_partial_score_and_not_a_zero():
    found = totals({"aesthetic_quality": 0.5, "imaging_quality": 0.7})
    assert found["quality"] == pytest.approx(60)
    assert found["semantic"] is None
    assert found["total"] is None
    assert found["partial"]
    assert len(found["missing"]) == 14


def test_results_are_gathered_by_the_prompt_in_the_file_name():
    rows = [{"video_path": f"/x/well-known place-{i}.mp4", "video_results": i} for i in (0, 12)]
    assert by_prompt("scene", rows) == {"well-known place": [0, 12]}
    assert by_prompt("imaging_quality", rows) == {"well-known place": [0, 0.12]}  # as its mean


def test_native_flickering_is_the_published_formula():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (7, 8, 10, 3), dtype=np.uint8)
    gaps = [np.abs(a.astype(int) - b).mean() for a, b in zip(frames[1:], frames[:-1], strict=True)]
    found = native(frames)
    assert found["temporal_flickering"] == pytest.approx((255 - np.mean(gaps)) / 255, rel=1e-6)
    still = np.repeat(frames[:1], 7, axis=0)
    assert native(still)["temporal_flickering"] == native(still)["linear_smoothness"] == 1
    ramp = (np.arange(7, dtype=np.uint8)[:, None, None, None] * 9).repeat(8, 1).repeat(8, 2)
    steady = native(ramp.repeat(3, 3))
    assert steady["linear_smoothness"] == 1  # even change is smooth
    assert steady["temporal_flickering"] < 1
    with pytest.raises(ValueError, match="f >= 3"):
        native(frames[:2])


FAKE = """
import json, os
class VBench:
    def __init__(self, device, suite, out):
        self.suite, self.out = suite, out
    def evaluate(self, videos_path, name, dimension_list, **more):
        if dimension_list == ["color"] and not os.environ.get("KEPT"):
            raise SystemExit(0)  # as the real one: no result, and no exit code either
        rows = []
        for row in json.load(open(self.suite)):
            for i in range(5):
                path = os.path.join(videos_path, f"{row['prompt_en']}-{i}.mp4")
                if os.path.exists(path):
                    rows.append({"video_path": path, "video_results": os.path.getsize(path) / 1e6})
        rows = rows[: int(os.environ.get("KEPT", 99))]  # "color" drops videos without a detection
        score = sum(r["video_results"] for r in rows) / len(rows)
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as f:
            json.dump({dimension_list[0]: [score, rows]}, f)
"""


@pytest.fixture
def fake_vbench(tmp_path):
    """An interpreter in which `import vbench` gives something that answers as the real one does."""
    package = tmp_path / "site"
    package.mkdir()
    (package / "vbench.py").write_text(FAKE)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{package}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_from_plan_to_score(tmp_path, suite_file, video_model, fake_vbench):
    call = {"num_inference_steps": 2, "num_frames": 9, "height": 32, "width": 32}
    dimensions = ("scene", "temporal_flickering", "color")
    plan = Plan(str(suite_file), video_model, dimensions=dimensions, indices=1,
                flicker_indices=3, inputs=call)  # fmt: skip
    ours, base = tmp_path / "ours", tmp_path / "base"
    for out in (ours, base):
        assert len(save_plan(plan, out)) == 3 + 1
    with pytest.raises(ValueError, match="videos are missing"):
        run_official(ours, fake_vbench, device="cpu")
    summary = generate(ours)
    assert summary.exit_code == 0, summary.failures
    names = sorted(p.name for p in (ours / "videos").iterdir())
    assert names == sorted(v.name for v in plan.videos())
    found = check(ours)
    assert (found.there, found.problems) == (4, [])
    assert any("part of the suite" in line for line in found.remarks)

    (ours / "videos" / "a still bowl-1.mp4").unlink()
    (ours / "videos" / "stray.mp4").write_bytes(b"")
    broken = check(ours)
    assert broken.there == 3
    assert any("a still bowl-1.mp4" in line for line in broken.problems)
    assert any("stray.mp4" in line for line in broken.problems)
    (ours / "videos" / "stray.mp4").unlink()
    assert generate(ours).made == 0  # finished work is kept, and linked again
    assert check(ours).problems == []

    wrong = run_official(ours, fake_vbench, device="cpu", tries=1)
    assert set(wrong) == {"color"}
    for k in (1, 2):
        generate(base, shard=(k, 2))
    assert check(base).problems == []
    result = score(ours, against=base)
    assert set(result["official"]) == {"scene", "temporal_flickering"}
    assert result["totals"]["partial"]
    assert not result["whole"]
    flicker = result["native"]["temporal_flickering"]
    assert flicker["prompts"] == 1  # of the prompts that VBench measures it on
    assert flicker["videos"] == 3
    assert flicker["difference"]["estimate"] == 0  # the same videos
    assert result["native"]["motion"]["prompts"] == 2


def test_another_plan_in_the_folder_gets_no_scores_of_the_first(
    tmp_path, suite_file, video_model, fake_vbench, monkeypatch
):
    monkeypatch.setenv("KEPT", "2")
    call = {"num_inference_steps": 1, "num_frames": 9, "height": 32, "width": 32}
    plan = Plan(str(suite_file), video_model, dimensions=("color",), indices=3, inputs=call)
    save_plan(plan, tmp_path)
    generate(tmp_path)
    assert run_official(tmp_path, fake_vbench, device="cpu") == {}
    figure = score(tmp_path)["official"]["color"]
    assert figure["remark"].startswith("of 2 of 3 videos")

    save_plan(replace(plan, inputs={**call, "num_inference_steps": 2}), tmp_path)
    found = check(tmp_path)
    assert found.there == 0
    assert found.problems[0].startswith("3 are not this plan's")
    with pytest.raises(ValueError, match="nothing to score of this plan"):
        score(tmp_path)
    assert generate(tmp_path).made == 3
    assert check(tmp_path).there == 3
    result = score(tmp_path)
    assert (result["official"], result["outdated"]) == ({}, ["color"])
    assert any("judge it again" in line for line in lines(result))
    run_official(tmp_path, fake_vbench, device="cpu")
    assert score(tmp_path)["outdated"] == []

    monkeypatch.setenv("KEPT", "0")
    (tmp_path / "official" / "color.json").unlink()
    assert "color" in run_official(tmp_path, fake_vbench, device="cpu", tries=1)


def test_other_protocols_do_not_compare(tmp_path, suite_file, video_model):
    plans = [Plan(str(suite_file), video_model, fps=fps) for fps in (8, 16)]
    for plan in plans:
        save_plan(plan, tmp_path / str(plan.fps))
    with pytest.raises(ValueError, match="fps"):
        score(tmp_path / "8", against=tmp_path / "16")
    with pytest.raises(ValueError, match="nothing to score"):
        score(tmp_path / "8")
    with pytest.raises(ValueError, match="no VBench plan"):
        vbench.read_plan(tmp_path)


def test_an_interpreter_without_vbench_is_refused(tmp_path, suite_file, video_model):
    save_plan(Plan(str(suite_file), video_model), tmp_path / "x")
    with pytest.raises(ValueError, match="import vbench"):
        run_official(tmp_path / "x", "/bin/false")
