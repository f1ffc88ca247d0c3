import numpy as np
import pytest
import torch

from accel.loop import step_generator
from accel.zoo.wan_autoencoder import (
    STAGES,
    PictureCodesLoss,
    WanAutoencoderConfig,
    WanAutoencoderLoss,
    as_frames,
    encode,
    frames_of,
    measure_latents,
    picture_codes,
    videos_to_tensor,
)
from accel.zoo.world import DigitWorld

TINY = WanAutoencoderConfig(width=4, latent_channels=2)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return TINY.build().eval()


def test_video_becomes_four_times_smaller_in_space_and_time(vae):
    with torch.inference_mode():
        latent = vae.encode(torch.zeros(1, 3, 17, 64, 64)).latent_dist.mean
        assert latent.shape == (1, 2, 5, 16, 16)
        assert vae.decode(latent).sample.shape == (1, 3, 17, 64, 64)
        assert vae.encode(torch.zeros(1, 3, 1, 32, 32)).latent_dist.mean.shape == (1, 2, 1, 8, 8)


def test_measured_scaling_makes_every_channel_standard(vae):
    world = DigitWorld("train", 0, 64)
    figures = measure_latents(vae, world, count=4)
    other = TINY.build().eval()
    other.load_state_dict(vae.state_dict())
    other.register_to_config(**figures)
    mean, deviation = encode(other, videos_to_tensor(world.videos(np.arange(4))[0]))
    sample = mean + deviation * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    # 5,120 numbers a channel, strongly correlated in space: the mean moves by the noise alone
    assert sample.mean((0, 2, 3, 4)).abs().max() < 0.07  # five standard errors of 5,120 draws
    assert (sample.var((0, 2, 3, 4)) - 1).abs().max() < 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_windows_depend_on_the_step_and_go_round_pictures_and_clips(stage):
    loss, turns = WanAutoencoderLoss(stage, 4, 0, torch.device("cpu")), STAGES[stage]
    for step, (side, frames, per_video) in enumerate(turns):
        x = loss.windows(step, step_generator(0, step))
        assert x.shape == (4 * per_video, 3, frames, side, side)
        assert torch.equal(x, loss.windows(step, step_generator(0, step)))
        later = step + len(turns)
        assert not torch.equal(x, loss.windows(later, step_generator(0, later)))


def test_frames_keep_their_order():
    x = torch.arange(2 * 3 * 4).reshape(2, 3, 4, 1, 1)
    assert frames_of(x)[5].flatten().tolist() == [13, 17, 21]  # second video, second frame


def test_picture_codes_are_what_every_fourth_picture_has_alone(vae):
    x = videos_to_tensor(DigitWorld("train", 0, 64).videos(np.arange(2))[0])
    codes = picture_codes(vae, x)
    assert codes.shape == (2, 2, 5, 16, 16)
    for frame in range(5):
        with torch.inference_mode():
            alone = vae.encode(x[:, :, 4 * frame : 4 * frame + 1]).latent_dist.mean
        assert torch.allclose(codes[:, :, frame : frame + 1], alone, atol=1e-5)
    frames = frames_of(codes)[:, :, None]
    assert torch.equal(as_frames(frames, 2), codes)


def test_codes_are_learned_from_pictures_and_clips():
    """The distance from the pictures' latents falls; a picture's own are where they were."""
    torch.manual_seed(0)
    model, teacher = TINY.build(), TINY.build().eval()
    teacher.load_state_dict(model.state_dict())
    loss = PictureCodesLoss(teacher, 4, 0, torch.device("cpu"))
    x = videos_to_tensor(DigitWorld("heldout", 0, 64).videos(np.arange(2))[0])[..., 16:48, 16:48]

    def apart(clip):
        with torch.no_grad():
            mean = model.encode(clip).latent_dist.mean
            return ((mean - picture_codes(teacher, clip)) / loss.deviation).square().mean().item()

    before, still = apart(x), apart(x[:, :, :1])
    assert still == pytest.approx(0, abs=1e-8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(24):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    assert apart(x) < 0.5 * before
    assert all(p.grad is None for p in teacher.parameters())
