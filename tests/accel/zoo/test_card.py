import json
from functools import partial

import numpy as np
import pytest
import torch

from accel import zoo
from accel.zoo.world import DigitWorld
from apps.evaluation.page import number
from benchmarks import bench_zoo, results_file, zoo_card, zoo_pictures
from benchmarks.zoo_subjects import CLASSES, SUBJECTS


@pytest.mark.parametrize("name", zoo.names())
def test_card_is_what_the_results_say(name):
    """No figure is typed by hand: write it again with `python -m benchmarks.tables`."""
    results = results_file.read(f"zoo_{name}")
    assert results is not None, f"{name} is shipped and not measured"
    assert (zoo.path(name) / "README.md").read_text() == zoo_card.card(results)


@pytest.mark.parametrize("name", zoo.names())
def test_results_are_of_the_shipped_weights(name):
    results = results_file.read(f"zoo_{name}")
    assert results["training"] == json.loads((zoo.path(name) / "training.json").read_text())


def test_a_card_quotes_the_report_or_says_that_there_is_none():
    results, report = (results_file.read(f"{kind}_digits-dit") for kind in ("zoo", "report"))
    row = report["recipes"][0]
    made = zoo_card.pipeline_card(results, SUBJECTS["digits-dit"], report)
    line = next(x for x in made.splitlines() if x.startswith(f"| [{row['label']}]"))
    for figure in (row["speedup"], row["figures"]["psnr"]["value"]):
        for bound in ("estimate", "low", "high"):
            assert number(figure[bound]) in line
    assert report["protocol"]["sha256"][:12] in made
    without = zoo_card.pipeline_card(results, SUBJECTS["digits-dit"], None)
    assert "Not evaluated yet: `accel evaluate all --model zoo:digits-dit" in without
    assert row["label"] not in without


def test_nearest_finds_the_picture_itself_whatever_its_background():
    pool, _ = DigitWorld("train", seed=1).batch(np.arange(5), class_ids=np.full(5, 37))
    found, distance = bench_zoo.nearest(pool, np.full(5, 37), 2, plain=False)
    assert np.array_equal(found[:, 0], pool)
    assert distance[:, 0] == pytest.approx(0, abs=1e-6)
    assert (distance[:, 1] > 0.01).all()


def test_grid_keeps_reading_order_and_fills_the_last_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    joined = zoo_pictures.grid(images, columns=3)
    assert joined.shape == (12, 18, 3)
    cells = [joined[3 + 6 * r, 3 + 6 * c, 0] for r in range(2) for c in range(3)]
    assert cells == [0, 1, 2, 3, 4, 255]


def test_window_of_a_video_is_round_its_digit():
    videos, _ = DigitWorld("heldout", canvas=64).videos(np.arange(6), frames=5)
    windows = bench_zoo.stills(videos)
    assert windows.shape == (6, 32, 32, 3)
    ink = bench_zoo.strokes(windows).reshape(6, 32, 32) > 0.5
    for mask in ink:
        assert np.abs(np.argwhere(mask).mean(0) - 15.5).max() < 4
    pictures = windows.copy()
    assert bench_zoo.stills(pictures) is pictures


def test_impostors_are_of_two_digits():
    real, what = DigitWorld("heldout").batch(np.arange(40))
    made = bench_zoo.impostors(real, what)
    assert {k: v.shape for k, v in made.items()} == dict.fromkeys(
        ("blends", "halves", "noise"), real.shape
    )
    assert np.array_equal(made["halves"][:, :16], real[:, :16])
    for name in ("blends", "halves"):
        assert (made[name] != real).any((1, 2, 3)).all()


@pytest.mark.parametrize("name", SUBJECTS)
def test_asked_attributes_cover_every_combination_evenly(name):
    subject = SUBJECTS[name]
    count = 2000 if not subject.is_video else 40
    samples, what = subject.real(count, seed=0)
    assert len(samples) == count
    if subject.is_video:
        assert set(what.motion) == {0, 1, 2, 3}
    else:
        combined = what.class_id + CLASSES * what.background
        assert (np.bincount(combined, minlength=500) == 4).all()


class Recorder:
    """Stands for a pipeline; keeps its calls and draws grey."""

    def __init__(self):
        self.calls = []

    def __call__(self, **call):
        self.calls.append(call)
        return (np.full((len(call["generator"]), 32, 32, 3), 0.5),)


def test_a_sample_depends_on_its_own_seed_whatever_the_batch():
    subject, pipe = SUBJECTS["digits-dit"], Recorder()
    _, what = subject.real(70, seed=0)
    images = subject.generate(pipe, what, 2.0, steps=3, seed=5)
    assert images.shape == (70, 32, 32, 3)
    assert images.max() == images.min() == 128
    seeds = [g.initial_seed() for call in pipe.calls for g in call["generator"]]
    assert seeds == [5 * 1_000_003 + i for i in range(70)]
    labels = [label for call in pipe.calls for label in call["class_labels"]]
    assert labels == what.class_id.tolist()
    assert {call["num_inference_steps"] for call in pipe.calls} == {3}


def test_evaluation_repeats_the_denoisers_own_call():
    seen = []
    subject = SUBJECTS["digits-dit"]
    pipe = subject.load()
    call = bench_zoo._denoiser_call(pipe, subject, rows=2)
    pipe.transformer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.inference_mode():
        call()
    assert [x.shape for x in seen] == [(4, 4, 8, 8)]  # two rows and their unconditional twins


def test_samples_of_another_pipeline_of_the_folder_are_judged_beside_its_own(monkeypatch):
    grey = {"DDIMPipeline": 0, "DDPMPipeline": 100}

    def load(subject):
        level = grey[subject.pipeline] / 255
        return lambda batch_size, **_: (np.full((batch_size, 32, 32, 3), level),)

    monkeypatch.setattr(type(SUBJECTS["digits-ddpm"]), "load", load)
    study = bench_zoo.Study(SUBJECTS["digits-ddpm"], 130)
    assert study.samples(1.0, 50).max() == 0
    assert study.also["DDPMPipeline"].samples(1.0, 50).min() == 100
    like, distances = bench_zoo.measure_digit_like(study), bench_zoo.measure_distances(study)
    assert {k: {"samples, DDPMPipeline", "samples"} <= set(v) for k, v in like.items()} == {
        "digits-judge": True,
        "digits-judge-b": True,
    }
    assert distances["50 steps, DDPMPipeline"] != distances["50 steps"]


def test_what_was_drawn_is_kept_for_a_study_that_goes_on_or_shares_the_work(tmp_path, monkeypatch):
    drawn = []

    class Counting(Recorder):
        def __call__(self, **call):
            drawn.extend(call["class_labels"])
            rows = [g.initial_seed() % 251 for g in call["generator"]]
            return (np.tile(np.array(rows)[:, None, None, None] / 255, (1, 32, 32, 3)),)

    monkeypatch.setattr(type(SUBJECTS["digits-dit"]), "load", lambda self: Counting())
    make = partial(bench_zoo.Study, SUBJECTS["digits-dit"], 120)
    plain = make().samples(2.0, 3)
    assert len(np.unique(plain)) > 100  # every sample is another
    assert len(drawn) == 120
    last = make(tmp_path, backwards=True)
    last._part(last.subject.parts(120)[-1], 2.0, 3)
    again = make(tmp_path).samples(2.0, 3)
    assert np.array_equal(again, plain)
    assert len(drawn) == 120 + 120  # the last batch, then the two others
    assert np.array_equal(make(tmp_path, backwards=True).samples(2.0, 3), plain)
    assert len(drawn) == 240
    assert make(tmp_path).samples(1.0, 3).shape == plain.shape
    assert len(drawn) == 360  # another guidance is another set
