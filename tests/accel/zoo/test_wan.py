import json

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch import nn

from accel.loop import step_generator
from accel.zoo import train
from accel.zoo.ship import ship
from accel.zoo.training import Training, trained_weights
from accel.zoo.wan import (
    COURSES,
    MODEL,
    PLACE_WEIGHT,
    SHORT,
    Course,
    Pool,
    TextToVideo,
    VelocityLoss,
    WanConfig,
    grid,
    kept_pool,
    tokenize,
)
from accel.zoo.wan_text import MAX_LENGTH, TextConfig

PROMPT = "a red three moving left on a dark background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All stages in miniature; the video is noise, the folder is stock."""
    out = tmp_path_factory.mktemp("wan")
    train.main(["digits-wan", "--preset", "smoke", "--out", str(out)])
    return out


def test_digits_wan_is_trained_shipped_and_loaded_from_nothing(folder):
    pipe = WanPipeline.from_pretrained(folder / "shipped", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(PROMPT, height=64, width=64, num_frames=17, num_inference_steps=1).frames
    assert video.shape == (1, 17, 64, 64, 3)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
    assert pipe.scheduler.config.prediction_type == "flow_prediction"
    # Half precision rounds by at most 2^-11, relative; below 2^-14 by 2^-25, absolute.
    trained = trained_weights(folder, "videos")
    for part, model in (("transformer", pipe.transformer), ("text", pipe.text_encoder)):
        for name, weight in model.state_dict().items():
            was = trained[f"{part}.{name}"]
            assert torch.allclose(weight, was, rtol=2**-11, atol=2**-25), name
    record = json.loads((folder / "shipped" / "training.json").read_text())
    stages = ["autoencoder", "clips", "codes", "pictures", "middles", "videos"]
    assert list(record["stages"]) == stages
    assert {s["step"] for s in record["stages"].values()} == {2}


def test_training_pads_the_text_as_the_pipeline_does(folder):
    """Same states, same padding: what is learned is what is asked."""
    pipe = WanPipeline.from_pretrained(folder / "shipped", dtype=torch.float32)
    model = TextToVideo(pipe.transformer, pipe.text_encoder).eval()
    x = torch.randn(1, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([700.0])
    with torch.inference_mode():
        for length in (SHORT, MAX_LENGTH):
            states, _ = pipe.encode_prompt(
                PROMPT, do_classifier_free_guidance=False, max_sequence_length=length
            )
            asked = pipe.transformer(x, t, states).sample
            learned = model(x, t, tokenize([PROMPT]), length)
            # Masked padding adds nothing but the order of a few sums.
            assert torch.allclose(asked, learned, atol=1e-5)


def test_a_warm_restart_goes_on_with_the_stage_that_is_named(folder, tmp_path):
    """Clips again, and what follows them; the first stage is kept."""
    start = ("--start", str(folder / "shipped"), "--again", "clips")
    train.main(["digits-wan", "--preset", "smoke", "--out", str(tmp_path), *start])
    record = json.loads((tmp_path / "shipped" / "training.json").read_text())["stages"]
    assert {stage: row["step"] for stage, row in record.items()} == {
        "autoencoder": 2,
        "clips": 4,
        "codes": 4,
        "pictures": 4,
        "middles": 4,
        "videos": 4,
    }


def test_an_unfinished_model_is_kept_in_parts(folder, tmp_path):
    """Only the autoencoder's stages are done: no pipeline is written, and none can be loaded."""
    for part in ("autoencoder", "clips", "vae", "settings.json"):
        (tmp_path / part).symlink_to(folder / part)
    ship("digits-wan", tmp_path, tmp_path / "parts")
    written = {str(f.relative_to(tmp_path / "parts")) for f in (tmp_path / "parts").rglob("*.*")}
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert written == {"vae/config.json", weights, "training.json"}
    record = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert list(record["stages"]) == ["autoencoder", "clips"]


class Recorder(nn.Module):
    """Stands for the networks: keeps what it was called with, answers 0 and knows every place."""

    def forward(self, x, timestep, tokens, length):
        self.x, self.t, self.tokens, self.length = x, timestep, tokens, length
        return torch.zeros_like(x)

    def places(self):
        return grid(*self.x.shape[2:]).expand(len(self.x), -1, -1)


@pytest.fixture(scope="module")
def pool():
    means = torch.randn(4000, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Pool(means, torch.full_like(means, 0.1), tokenize([PROMPT]).repeat(4000, 1))


def velocity(pool, course=None):
    course = course or Course(4, COURSES["videos"].shift)
    return VelocityLoss(pool, course, 2000, 0, torch.device("cpu"))


def test_stills_are_single_frames_of_the_pool_and_count_as_much_as_videos():
    means = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(50, 2, 5, 4, 4)
    pool = Pool(means, torch.zeros_like(means), tokenize([PROMPT]).repeat(50, 1))

    class Silent(Recorder):
        calls, errors = [], []

        def forward(self, x, *rest):
            self.calls.append((x, rest[0] / 1000))
            return super().forward(x, *rest)

    course = Course(4, 3.0, middle=2, stills=40)
    loss = VelocityLoss(pool, course, 10, 0, torch.device("cpu"))(Silent(), 0)
    (videos, _), (stills, sigma) = Silent.calls
    assert videos.shape == (10, 2, 5, 2, 2)
    assert stills.shape == (40, 2, 1, 2, 2)
    clean = stills.mean((1, 2, 3, 4)) / (1 - sigma)
    few = sigma < 0.3  # of 8 numbers
    assert torch.allclose(clean[few], clean[few].round(), atol=0.5)
    assert len(set(clean[few].round().tolist())) > 2, "frames of all times"
    # The error of answering 0: 1 + 6 (0, 1, 4, 9 and 16 in turn), of videos and of stills alike.
    assert loss.item() == pytest.approx(7, rel=0.25)


def test_loss_is_a_function_of_the_step(pool):
    losses = [velocity(pool)(Recorder(), step) for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_noise_levels_are_those_of_the_course_and_a_tenth_of_captions_is_dropped(pool):
    recorder = Recorder()
    loss = velocity(pool)(recorder, 0)
    # v = eps - x0, of variance 1 + 1 + 0.01: the error of answering 0
    assert loss.item() == pytest.approx(2.01, abs=0.05)
    parts = torch.linspace(0, 1, 2001)  # one level in each
    low, high = (
        1000 * Course(4, COURSES["videos"].shift).sigma(u) for u in (parts[:-1], parts[1:])
    )
    assert (recorder.t >= low - 0.01).all()
    assert (recorder.t <= high + 0.01).all()
    sigma = recorder.t / 1000
    expected = (1 - sigma) ** 2 * 1.01 + sigma**2
    assert (recorder.x.flatten(1).var(1) / expected).mean().item() == pytest.approx(1, abs=0.03)
    empty = (recorder.tokens == tokenize([""])).all(1).float().mean().item()
    assert empty == pytest.approx(0.1, abs=5 * (0.09 / 2000) ** 0.5)


def test_noise_levels_are_shifted_as_the_solver_shifts_them():
    u = (torch.arange(2000) + 0.5) / 2000
    assert torch.allclose(Course(1, shift=3.0).sigma(u), 3 * u / (1 + 2 * u))


def test_tokens_that_do_not_know_their_places_cost_half_of_the_variance_of_places(pool):
    class Lost(Recorder):
        def places(self):
            return torch.zeros_like(super().places())

    knows, lost = velocity(pool)(Recorder(), 0), velocity(pool)(Lost(), 0)
    # Rows and columns have variance 1; of the pool's only frame the frame is 0.
    assert (lost - knows).item() == pytest.approx(PLACE_WEIGHT * 2 / 3, rel=1e-5)


def test_places_are_frame_row_and_column_in_the_order_of_the_transformers_tokens():
    places = grid(5, 4, 3)
    assert torch.allclose(places.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(places.std(0, correction=0), torch.ones(3))
    transformer = WanConfig(layers=1).build()
    seen = []
    transformer.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    nn.init.ones_(transformer.patch_embedding.weight)
    nn.init.zeros_(transformer.patch_embedding.bias)
    for axis in range(3):
        video = places[:, axis].reshape(1, 1, 5, 4, 3).expand(1, 6, 5, 4, 3) / 6
        with torch.inference_mode():
            transformer(video, torch.tensor([500.0]), torch.zeros(1, 1, 64))
        assert torch.allclose(seen.pop()[0, :, 0], places[:, axis], atol=1e-6)


def test_places_can_be_told_from_pure_noise():
    """Rotary positions are relative; asked for it, a network finds where its tokens are."""
    torch.manual_seed(0)
    model = TextToVideo(WanConfig(layers=2).build(), TextConfig(layers=1).build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target, words, g = grid(1, 1, 8), tokenize([PROMPT]).repeat(64, 1), step_generator(0, 0)
    errors = []
    for _ in range(150):
        model(torch.randn(64, 6, 1, 1, 8, generator=g), torch.full((64,), 1000.0), words, SHORT)
        error = (model.places() - target)[..., 2].square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert errors[0] > 0.9
    assert np.mean(errors[-10:]) < 0.5


def test_one_step_in_four_sees_the_pipelines_own_padding(pool):
    lengths = []
    for step in range(8):
        recorder = Recorder()
        velocity(pool)(recorder, step)
        lengths.append(recorder.length)
    assert lengths == 2 * [MAX_LENGTH, SHORT, SHORT, SHORT]


def test_a_resumed_run_reads_what_it_encoded(pool, tmp_path):
    run = Training("digits-wan", MODEL.presets["smoke"], tmp_path)
    kept_pool(run, "videos", lambda: pool)
    run.resume = True
    again = kept_pool(run, "videos", lambda: pytest.fail("encoded again"))
    assert all(torch.equal(vars(again)[name], value) for name, value in vars(pool).items())
    other = Pool(pool.means + 1, pool.deviations, pool.tokens)
    assert kept_pool(run, "pictures", lambda: other) is other  # another stage
    run.resume = False
    assert kept_pool(run, "videos", lambda: other) is other  # another run into the same folder


def test_every_sample_is_seen_once_a_pass_in_a_new_order(pool):
    loss = velocity(pool)
    first, second = (torch.cat([loss.rows(2 * e + i) for i in range(2)]) for e in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(4000))
    assert torch.equal(second.sort().values, torch.arange(4000))
    assert not torch.equal(first, second)


def test_fresh_networks_predict_zero_and_have_the_designs_tokens():
    model = TextToVideo(WanConfig(layers=1).build(), TextConfig(layers=1).build())
    x = torch.randn(1, 6, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    model.transformer.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.inference_mode():
        v = model(x, torch.tensor([500.0]), tokenize([PROMPT]), SHORT)
    assert np.array_equal(v, torch.zeros_like(x))
    assert seen[0].shape[1] == 1280
