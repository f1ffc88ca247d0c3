import json

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler
from safetensors import safe_open
from torch import nn

from accel import zoo
from accel.checkpoints import newest_checkpoint
from accel.loop import LoopSettings, fit
from accel.zoo import ddpm, train
from accel.zoo.judge import Judge
from accel.zoo.training import ema_weights
from accel.zoo.world import DigitWorld

NAME = "digits-ddpm"
HALF_ROUNDING = {"rtol": 2**-11, "atol": 2**-25}  # relative; absolute below the normal numbers
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
shipped = pytest.mark.skipif(NAME not in zoo.names(), reason=f"{NAME} is not shipped")


class Recorder(nn.Module):
    """Stands for the network; keeps what it was called with and predicts zero."""

    def forward(self, x, timestep):
        self.x, self.t = x, timestep
        return type("Output", (), {"sample": torch.zeros_like(x)})


def test_loss_is_a_function_of_the_step():
    losses = [ddpm.NoiseLoss(4, 0, "cpu")(Recorder(), step) for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_the_expected_noise_has_no_loss():
    class Oracle(Recorder):
        def forward(self, x, timestep):
            alpha = ddpm.build_scheduler().alphas_cumprod[timestep]
            return type("Output", (), {"sample": loss.expected_noise(x, x, alpha, self.jitter)})

    loss, oracle = ddpm.NoiseLoss(4, 0, "cpu"), Oracle()
    loss.seed(2)
    _, oracle.jitter = loss.pictures.draw(4, loss.generator)
    # The same sums in another memory order, of float32 numbers of up to 1e6.
    assert loss(oracle, 2).item() < 1e-4
    assert loss(oracle, 3).item() > 100 * loss(oracle, 2).item()  # control: another step's jitter


def test_the_expected_picture_is_the_mean_of_all_by_likelihood():
    """Three scans of two digits, in all colours on all levels, drawn one by one."""
    pictures = ddpm.PlainPictures("train", 32, "cpu")
    pictures.opacity, pictures.counts = pictures.opacity[[0, 5, 400]], torch.tensor([2, 1])
    pictures.sum_up()
    jitter, generator = torch.tensor([0.03, -0.04]), torch.Generator().manual_seed(0)
    xt, alpha = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([0.01, 0.05])
    for row in range(2):
        pool, prior = [], []
        for opacity, weight in zip(pictures.opacity, (0.25, 0.25, 0.5), strict=True):
            for colour in pictures.colours:
                for level in pictures.levels:
                    grey = (level + jitter[row]).clamp(0, 1)
                    pool.append(2 * torch.lerp(grey, colour[:, None, None], opacity) - 1)
                    prior.append(weight)
        pool = torch.stack(pool).double()
        apart = (xt[row] - alpha[row].sqrt() * pool).square().sum(dim=(1, 2, 3))
        likely = -apart / (2 * (1 - alpha[row])) + torch.tensor(prior).log()
        mean = torch.einsum("p,pchw->chw", likely.softmax(0), pool)
        assert likely.softmax(0).max() < 0.9  # several count
        assert torch.allclose(pictures.expected(xt, alpha, jitter)[row].double(), mean, atol=1e-4)


def test_noise_of_a_clear_picture_is_the_noise_that_was_drawn():
    """At timestep 150 no two pictures are alike; at 5 the rounding shows, which `eps` knows."""
    loss = ddpm.NoiseLoss(8, 0, "cpu")
    loss.seed(0)
    x0, jitter = loss.pictures.draw(8, loss.generator)
    eps = torch.randn(x0.shape, generator=loss.generator)
    for t, tolerance in ((150, 0.05), (5, 0)):
        alpha = loss.alphas[t].expand(8)
        found = loss.expected_noise(ddpm.add_noise(x0, eps, alpha), eps, alpha, jitter)
        assert torch.allclose(found, eps, rtol=0, atol=tolerance)


def test_pictures_are_those_of_the_plain_world():
    """Each is the world's picture of the same scan, up to its grey, which is read from a corner."""
    own, _ = ddpm.PlainPictures("train", 32, "cpu").draw(500, torch.Generator().manual_seed(0))
    own = ((own + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    world = DigitWorld("train", 0, plain=True)
    pictures, _ = world.batch(np.arange(20_000))
    known = {(p[0, 0, 0], p.tobytes()) for p in pictures}
    found = [(p[0, 0, 0], p.tobytes()) in known for p in own]
    # 1,077 scans x 10 colours x about 95 greys: of 20,000 draws, one in 51 is drawn again
    assert sum(found) >= 3
    ours, theirs = (np.bincount(p[:, 0, 0, 0], minlength=256) / len(p) for p in (own, pictures))
    assert np.abs(np.cumsum(ours) - np.cumsum(theirs)).max() < 1.95 * (1 / 500 + 1 / 20_000) ** 0.5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_a_recorded_step_is_the_same_step(tmp_path, device):
    """Rates in tensors, numbers from the generator, optimiser fused; on a CPU that is all.

    Adam's first steps have the size of the rate whatever the gradient, so roundings of tiny
    gradients show: a tenth of the eight steps is allowed, a wrong rate or picture would be all.
    """
    ends = []
    for graph in (False, True):
        torch.manual_seed(0)
        unet, lr = ddpm.UNetConfig((16, 16)).build().eval(), 1e-3
        settings = LoopSettings(steps=8, lr=lr, warmup=8, graph=graph)
        loss, out = ddpm.NoiseLoss(2, 0, device), tmp_path / str(graph)
        weights, position = fit("unet", unet, loss, settings, out, cpu=device == "cpu")
        assert position.step == 8
        ends.append((weights, dict(unet.named_parameters())))
    for plain, recorded in zip(*ends, strict=True):
        apart = torch.cat([(plain[k] - recorded[k]).flatten() for k in plain]).abs()
        assert apart.mean() < 0.1 * lr


def test_muon_cannot_be_recorded():
    with pytest.raises(ValueError, match="muon or graph"):
        LoopSettings(steps=1, muon=True, graph=True)


def test_timesteps_cover_the_schedule():
    t = ddpm.stratified_timesteps(2000, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(t // 2, torch.arange(2000) // 4)
    assert (t.min(), t.max()) == (0, 999)


def test_half_of_the_timesteps_are_those_that_shape():
    t = ddpm.shaping_timesteps(2000, 1000, torch.Generator().manual_seed(0))
    first, last = ddpm.SHAPED
    assert torch.equal(t[:1000], t[:1000].clamp(first, last - 1))
    assert torch.equal(t[1000:], torch.arange(1000))


def test_min_snr_counts_an_error_of_the_picture_up_to_gamma():
    """Where the ratio of variances is 10, an error of the noise counts as half."""
    error, snr = torch.full((3, 1, 2, 2), 3.0), torch.tensor([0.1, 5.0, 10.0])
    assert torch.allclose(ddpm.min_snr_error(error, snr), torch.tensor([9.0, 9.0, 4.5]))


def test_averages_of_an_error_have_their_own_min_snr():
    """A constant error is the same at 1, 2 and 4 pixels; one that alternates is at 1 only.

    Pixels of ratios 0.1 and 2: larger scales have 0.4, 1.6 and 8, 32, of which 5 count at most. By
    pixels every error counts alike.
    """
    constant, snr = torch.full((2, 3, 8, 8), 2.0), torch.tensor([0.1, 2.0])
    expected = torch.tensor([4 * (1 + (0.4 + 1.6) / 0.1), 4 * (1 + (5 + 5) / 2)])
    assert torch.allclose(ddpm.multiscale_error(constant, snr), expected)
    signs = 1 - 2 * (torch.arange(8) % 2)
    assert torch.equal(ddpm.multiscale_error(constant * signs, snr), torch.full((2,), 4.0))


def test_fresh_network_predicts_its_input():
    """Up to what the last normalisation takes for its scale.

    A group's variance is (v + 64) / 2 for inputs of variance v, so its deviation is off by
    (v - 1) / (2 x 65): v is uncertain by (2 / 1024)^(1/2), of which five times are allowed, or a
    fifth off where the noise is.
    """
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = ddpm.UNetConfig().build()
    for scale, rtol in ((1.0, 5 * (2 / 1024) ** 0.5 / 130), (1.1, 0.44 / 130)):
        out = model(scale * x, torch.tensor([3, 700])).sample
        assert torch.allclose(out, scale * x, rtol=rtol, atol=1e-5)


def test_identity_wants_room_for_it():
    with pytest.raises(ValueError, match="4 groups of 2 for 3 inputs"):
        ddpm.UNetConfig(widths=(8, 16)).build()


def test_trained_shipped_and_loaded_from_nothing(tmp_path):
    train.main([NAME, "--preset", "smoke", "--steps", "2", "--out", str(tmp_path)])
    pipe = DDPMPipeline.from_pretrained(tmp_path / "shipped")
    assert type(pipe.scheduler) is DDPMScheduler
    trained = ema_weights(newest_checkpoint(tmp_path / "unet"))
    for name, weight in pipe.unet.state_dict().items():
        assert torch.allclose(weight, trained[name], **HALF_ROUNDING), name
    record = json.loads((tmp_path / "shipped" / "training.json").read_text())
    assert record["stages"]["unet"]["step"] == 2


@shipped
def test_warm_restart_goes_on_from_the_shipped_weights(tmp_path):
    smoke = ["--preset", "smoke", "--steps", "1", "--out", str(tmp_path), "--start", "shipped"]
    train.main([NAME, *smoke])
    shipped = DDPMPipeline.from_pretrained(zoo.path(NAME)).unet.state_dict()
    end = newest_checkpoint(tmp_path / "unet")
    for name, weight in ema_weights(end).items():
        # Adam's first step is at most lr = 1e-3 / warmup 200, of which the average takes a part.
        assert torch.allclose(weight, shipped[name], atol=1e-5), name


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline.from_pretrained(zoo.path(NAME))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@shipped
def test_shipped_folder_is_stock_small_and_half_precision(pipe):
    config = pipe.scheduler.config
    assert (config.beta_schedule, config.prediction_type) == ("linear", "epsilon")
    assert config.clip_sample
    (file,) = zoo.path(NAME).rglob("*.safetensors")
    assert file.stat().st_size < 4e6
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_tensor(k).dtype for k in tensors.keys()} == {torch.float16}  # noqa: SIM118
    for config in zoo.path(NAME).rglob("*.json"):
        assert "_name_or_path" not in config.read_text(), config


@shipped
def test_shipped_model_draws_digits(pipe):
    """Of 20, at 20 steps to be fast: a share of 0.9 falls below 12 once in 16,000 draws."""
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=20, num_inference_steps=20, generator=generator, output_type="np")
    pictures = np.round(images.images * 255).astype(np.uint8)
    assert Judge.load(zoo.path("digits-judge")).digit_like(pictures).mean() >= 0.6
