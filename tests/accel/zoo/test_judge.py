"""Both judges have one interface, so what holds for one is asked of both."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from accel import zoo
from accel.zoo.judge import (
    DIGIT_CONFIDENCE,
    FEATURES,
    HEADS,
    Judge,
    accuracy,
    attend,
    five_frames,
    judge,
    to_tensor,
    travel,
    video_tensor,
)
from accel.zoo.judge_b import Referee
from accel.zoo.judge_data import FRAMES, JudgeLoss, non_digits, one_hot, roughen, signed
from accel.zoo.world import MOTIONS, DigitWorld

NAMES = ("digits-judge", "digits-judge-b")
ACCEPTED = 0.98  # on held-out handwriting; what the judges are shipped for
OPPOSITE = [MOTIONS.index(name) for name in ("right", "left", "down", "up")]


def floor(share: float, count: int) -> float:
    """Three standard errors of `count` samples below a share: a true `share` stays above."""
    return share - 3 * (share * (1 - share) / count) ** 0.5


def ceiling(share: float, count: int) -> float:
    return 1 - floor(1 - share, count)


@pytest.fixture(scope="module", params=NAMES)
def either(request):
    return judge(request.param)


@pytest.fixture(scope="module")
def pictures():
    return DigitWorld("heldout").batch(np.arange(400))


@pytest.fixture(scope="module")
def films():
    return DigitWorld("heldout", canvas=64).videos(np.arange(60), frames=5)


def test_pictures_of_heldout_handwriting_are_read(either):
    shares = accuracy(either, DigitWorld("heldout"), 2000)
    assert set(shares) == {*HEADS, "all"}
    for name in HEADS:
        assert shares[name] >= floor(ACCEPTED, 2000), name


def test_videos_of_heldout_handwriting_are_read(either):
    shares = accuracy(either, DigitWorld("heldout", canvas=64), 60, videos=True)
    assert set(shares) == {*HEADS, "motion", "all"}
    for name in (*HEADS, "motion"):
        assert shares[name] >= floor(ACCEPTED, 60), name


def test_other_samples_attributes_are_right_by_chance_only(either, pictures, films):
    """Control: with shuffled labels nothing is left but chance, 1 in so many classes."""
    images, what = pictures
    answers = either.answers(images)
    for name, classes in HEADS.items():
        share = (answers[name] == np.roll(getattr(what, name), 1)).mean()
        assert share < ceiling(1 / classes, 400), name
    videos, what = films
    share = (either.video_answers(videos)["motion"] == np.roll(what.motion, 1)).mean()
    assert share < ceiling(1 / len(MOTIONS), 60)


def test_reversed_frames_show_the_opposite_motion(either, films):
    videos, what = films
    answers = either.video_answers(videos[:, ::-1].copy())
    opposite = np.array(OPPOSITE)[what.motion]
    assert (answers["motion"] == opposite).mean() >= floor(ACCEPTED, 60)
    assert (answers["digit"] == what.digit).mean() >= floor(ACCEPTED, 60)


def test_nobody_is_sure_how_a_frozen_video_moves(either, films):
    videos, _ = films
    frozen = videos[:, 2:3].repeat(5, axis=1)
    sure = {
        name: (either.video_confidences(x)["motion"] > DIGIT_CONFIDENCE).mean()
        for name, x in (("frozen", frozen), ("moving", videos))
    }
    assert sure["frozen"] <= ceiling(0.02, 60)
    assert sure["moving"] >= floor(ACCEPTED, 60)  # control: they can be sure


def others(images: np.ndarray, what) -> tuple[np.ndarray, np.ndarray]:
    """Partners with another digit: one of any look, and one that differs by the digit alone."""
    digits = (what.digit + 1 + np.arange(len(images)) % 9) % 10
    world = DigitWorld("heldout")
    colours = np.roll(what.colour, 3)
    any_look = world.batch(np.arange(len(images)) + len(images), digits + 10 * colours)[0]
    return any_look, world.batch(np.arange(len(images)), digits + 10 * what.colour)[0]


def outliers(images: np.ndarray, what) -> dict[str, np.ndarray]:
    """No digits, by kind, (n, 32, 32, 3) uint8 each."""
    generator = torch.Generator().manual_seed(7)
    n = len(images)
    made = {}
    for look, other in zip(("any look", "one look"), others(images, what), strict=True):
        made[f"average, {look}"] = ((images.astype(int) + other) // 2).astype(np.uint8)
        made[f"left and right, {look}"] = np.concatenate([images[:, :, :16], other[:, :, 16:]], 2)
        made[f"top and bottom, {look}"] = np.concatenate([images[:, :16], other[:, 16:]], 1)
    noise = torch.randn(n, 3, 32, 32, generator=generator)
    made["noise"] = to_pixels(0.5 * noise)
    rough = torch.randn(n, 3, 5, 5, generator=generator)
    made["smooth noise"] = to_pixels(0.6 * F.interpolate(rough, (32, 32), mode="bicubic"))
    tiles = images.reshape(n, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(n, 16, 8, 8, 3)
    order = torch.rand(n, 16, generator=generator).argsort(1).numpy()
    tiles = np.take_along_axis(tiles, order[..., None, None, None], 1)
    made["shuffled"] = tiles.reshape(n, 4, 4, 8, 8, 3).swapaxes(2, 3).reshape(n, 32, 32, 3)
    return made


def to_pixels(x: torch.Tensor) -> np.ndarray:
    return ((x.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).contiguous().numpy()


def test_digits_are_digits_and_nothing_else_is(either, pictures):
    images, what = pictures
    assert either.digit_like(images).mean() >= floor(0.95, 400)
    for kind, made in outliers(images, what).items():
        if "and" not in kind or "any look" in kind:
            assert either.digit_like(made).mean() <= ceiling(0.05, 400), kind


def test_confidence_is_the_probability_of_the_answer(either, pictures):
    images = pictures[0][:8]
    with torch.inference_mode():
        chances = either(to_tensor(images))["digit"].softmax(1)
    assert np.array_equal(either.answers(images)["digit"], chances.argmax(1).numpy())
    assert np.array_equal(either.confidences(images)["digit"], chances.max(1).values.numpy())
    threshold = either.confidences(images)["digit"] > DIGIT_CONFIDENCE
    assert np.array_equal(either.digit_like(images), threshold)


def test_a_judge_survives_its_file(either, pictures, films, tmp_path):
    either.save(tmp_path)
    again = type(either).load(tmp_path)
    assert again.config == either.config
    assert not again.training
    images = to_tensor(pictures[0][:8])
    videos = torch.stack([to_tensor(video) for video in films[0][:2]]).transpose(1, 2)
    with torch.inference_mode():
        assert torch.equal(either.features(images), again.features(images))
        assert torch.equal(either.video_features(videos), again.video_features(videos))
        assert again.features(images).shape == (8, FEATURES)
        assert again.video_features(videos).shape == (2, FEATURES + 2 * FRAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_judges_are_small(name):
    """0.6 MB: the package is to stay small enough for a wheel without a download."""
    assert (zoo.path(name) / "model.safetensors").stat().st_size <= 0.6 * 2**20


def test_judges_are_loaded_once_and_by_name_only():
    assert judge("digits-judge") is judge("digits-judge")
    assert type(judge("digits-judge-b")) is Referee
    assert type(judge("digits-judge")) is Judge
    with pytest.raises(ValueError, match="no judge 'digits-dit'; known: digits-judge, digits-judg"):
        judge("digits-dit")


def test_a_video_is_seen_by_five_frames():
    x = torch.arange(17.0).expand(1, 3, 17)[..., None, None]
    assert five_frames(x)[0, 0].flatten().tolist() == [0, 4, 8, 12, 16]
    with pytest.raises(ValueError, match="a video of 4 frames; it needs at least 5"):
        five_frames(x[:, :, :4])


def test_attention_knows_where_it_looks():
    cells = torch.arange(25.0).view(1, 1, 5, 5)
    logits = torch.full((1, 1, 5, 5), -50.0)
    logits[0, 0, 1, 4] = 50
    mean, where = attend(cells, logits)
    assert mean.item() == pytest.approx(9)  # row 1, column 4
    assert where[0].tolist() == pytest.approx([1.0, -0.5])  # x, y in -1..1


def test_travel_is_from_end_to_end_and_nothing_where_it_stands():
    line = torch.linspace(-0.5, 0.7, 5)
    where = torch.stack([line, torch.full((5,), 0.3)], 1)[None]
    assert travel(where)[0].tolist() == pytest.approx([1.2, 0.0], abs=1e-6)
    assert travel(where.flip(1))[0].tolist() == pytest.approx([-1.2, 0.0], abs=1e-6)


def test_loss_is_a_function_of_the_step():
    torch.manual_seed(0)
    model = Judge()
    losses = [JudgeLoss(8, 0, torch.device("cpu"))(model, step) for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_targets_are_the_truth_but_for_outliers():
    loss = JudgeLoss(64, 0, torch.device("cpu"))
    _, targets = loss.pictures(3, torch.Generator().manual_seed(0))
    truth = one_hot(loss.world.attributes(np.arange(192, 256)), HEADS)
    for name, classes in HEADS.items():
        assert torch.equal(targets[name][16:], truth[name][16:])
        blank = 1 / classes if name == "digit" else 0
        assert torch.equal(targets[name][:16], torch.full((16, classes), blank))


def test_frames_are_of_videos_with_the_digit_anywhere_and_some_outliers():
    loss = JudgeLoss(64, 0, torch.device("cpu"))
    x, targets = loss.frames(4, torch.Generator().manual_seed(0))
    assert x.shape == (16, 3, 64, 64)
    truth = one_hot(loss.film.attributes(np.arange(64, 80)), HEADS)
    for name, classes in HEADS.items():
        assert torch.equal(targets[name][4:], truth[name][4:])
        blank = 1 / classes if name == "digit" else 0
        assert torch.equal(targets[name][:4], torch.full((4, classes), blank))


def test_video_features_keep_content_and_place_apart(films):
    """Frames in another order change the places alone; another colour changes the content."""
    videos = video_tensor(films[0][:4])
    with torch.inference_mode():
        plain, shuffled, recoloured = (
            judge("digits-judge").video_features(x)
            for x in (videos, videos[:, :, [2, 0, 4, 1, 3]], videos[:, [1, 2, 0]])
        )
    assert torch.allclose(plain[:, :FEATURES], shuffled[:, :FEATURES], atol=1e-4)  # sums of five
    assert (plain - shuffled)[:, FEATURES:].abs().amax(1).min() > 1
    assert (plain - recoloured)[:, :FEATURES].abs().amax(1).min() > 0.1


def test_roughening_grows_with_its_strength_and_keeps_the_shape():
    x = signed(DigitWorld().batch(np.arange(16))[0])
    changes = []
    for bend in (0.0, 1.0, 3.0):
        rough = roughen(x, torch.Generator().manual_seed(0), bend)
        assert rough.shape == x.shape
        changes.append((rough - x).abs().mean())
    assert changes[0] < changes[1] < changes[2]


def test_outliers_in_training_are_neither_of_their_two_digits():
    world = DigitWorld("train")
    indices = np.arange(200)
    images, what = world.batch(indices)
    twins = signed(world.batch(indices, class_ids=(what.digit + 3) % 10 + 10 * what.colour)[0])
    x = signed(images)
    made = non_digits(x, twins, torch.Generator().manual_seed(0))
    assert made.shape == x.shape
    assert (made - x).abs().mean((1, 2, 3)).min() > 0
    assert (made - twins).abs().mean((1, 2, 3)).min() > 0


def test_no_work_of_the_project_reads_the_referees_weights():
    """The referee is for reports: its own module, the loader by name and the reports know it."""
    package = Path(zoo.__file__).parents[1]
    knowing = {p.name for p in package.rglob("*.py") if "digits-judge-b" in p.read_text()}
    assert knowing <= {"judge.py", "judge_b.py", "ship.py", "extractors.py"}
