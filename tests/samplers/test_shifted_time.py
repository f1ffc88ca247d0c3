"""Time-shift schedulers against the official code's numbers and the stock classes."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, PNDMScheduler

from accel.testing import assert_equal, tiny
from samplers.shifted_time import (
    TimeShiftDDIMScheduler,
    TimeShiftDDPMScheduler,
    TimeShiftPNDMScheduler,
)

STOCK = {
    TimeShiftDDIMScheduler: DDIMScheduler,
    TimeShiftDDPMScheduler: DDPMScheduler,
    TimeShiftPNDMScheduler: PNDMScheduler,
}
T = 1000


def latents() -> torch.Tensor:
    """Three samples (3, 1, 4, 4) with variances 0.81, 1 and 1.21, from no random generator."""
    x = torch.sin(2.399963 * torch.arange(1, 17, dtype=torch.float32))
    x = ((x - x.mean()) / x.std()).view(1, 1, 4, 4)
    return x * torch.tensor([0.9, 1.0, 1.1]).view(3, 1, 1, 1)


def gaussian_eps(alphas: torch.Tensor, v0: float = 0.25):
    """The exact noise prediction for data N(0, v0); t: one time, or one for each sample."""

    def eps(x: torch.Tensor, t) -> torch.Tensor:
        a = alphas[torch.as_tensor(t)]
        a = a.view(-1, *[1] * (x.ndim - 1)) if a.ndim else a
        return (1 - a).sqrt() * x / (v0 * a + 1 - a)

    return eps


def test_the_variances_are_those_of_the_golden_values():
    x = latents()
    assert torch.allclose(x.flatten(1).var(1), torch.tensor([0.81, 1.0, 1.21]))
    expected = torch.tensor([0.8684139, -1.3564316, 1.0256081])
    assert torch.allclose(x[1].flatten()[:3], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "expected"),
    [(40, (0.306964, 0.361158, 0.397274)), (0, (0.293926, 0.326585, 0.359243))],
)
def test_ddim_equals_the_official_code(window, expected):
    """Golden values of the authors' solver, whose 10 steps leave out the first of the grid."""
    scheduler = TimeShiftDDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        window=window, cutoff=200, variant="pnm", per_sample=True,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    x, eps = latents(), gaussian_eps(scheduler.alphas_cumprod)
    for t in scheduler.timesteps[1:]:
        x = scheduler.step(eps(x, t), t, x).prev_sample
    assert torch.allclose(x[:, 0, 0, 0], torch.tensor(expected), atol=1e-5)


GOLDEN = [  # history, network calls, results with and without the shift
    (2, 10, (0.361725, 0.417769, 0.459546), (0.348400, 0.387111, 0.425823)),
    (4, 18, (0.402199, 0.469500, 0.516450), (0.385486, 0.428319, 0.471150)),
]


@pytest.mark.parametrize(("history", "calls", "shifted", "unshifted"), GOLDEN)
def test_pndm_equals_the_official_code(history, calls, shifted, unshifted):
    """S-PNDM and F-PNDM; the official 10 steps start one move late, at 801."""
    for window, expected in ((40, shifted), (0, unshifted)):
        scheduler = TimeShiftPNDMScheduler(
            steps_offset=1, skip_prk_steps=history == 2, history=history,
            window=window, cutoff=200, variant="pnm", per_sample=True,
        )  # fmt: skip
        scheduler.reads_conditioning = True
        scheduler.set_timesteps(10)
        if history == 2:
            times = [801, 701, 701, 601, 501, 401, 301, 201, 101, 1]
        else:
            starts = [801, 751, 751, 701, 701, 651, 651, 601, 601, 551, 551, 501]
            scheduler.prk_timesteps = torch.tensor(starts).numpy()
            times = [*starts, 501, 401, 301, 201, 101, 1]
        scheduler.timesteps, scheduler._grid = torch.tensor(times), list(times)
        assert len(times) == calls
        x, eps = latents(), gaussian_eps(scheduler.alphas_cumprod)
        for t in scheduler.timesteps:
            time = t if scheduler.conditioning is None else scheduler.conditioning
            x = scheduler.step(eps(x, time), t, x).prev_sample
        assert torch.allclose(x[:, 0, 0, 0], torch.tensor(expected), atol=1e-5)


def run(scheduler, x, *, steps=10, skip=0, told=None, seed=0, **step):
    """Samples from x with the exact model of `gaussian_eps`; appends to `told` what it is told."""
    scheduler.set_timesteps(steps)
    eps = gaussian_eps(scheduler.alphas_cumprod)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(x))]
    for t in scheduler.timesteps[skip:]:
        time = t if scheduler.conditioning is None else scheduler.conditioning
        if told is not None:
            told.append(torch.as_tensor(time).tolist())
        if not isinstance(scheduler, PNDMScheduler):
            step["generator"] = generators
        x = scheduler.step(eps(x, time), t, x, **step).prev_sample
    return x


def test_nearest_times_are_those_of_the_official_picker():
    scheduler = TimeShiftDDIMScheduler(window=40, variant="pnm", per_sample=True)
    expected = {0.80: (396, 481, 581), 0.90: (421, 481, 581), 0.95: (421, 521, 581)}
    for variance, times in expected.items():
        x = latents()[1:2] * math.sqrt(variance)
        assert tuple(int(scheduler._nearest(x, c)) for c in (401, 501, 601)) == times


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize(
    "off", [{}, {"window": 40, "cutoff": T}, {"window": 0, "variant": "pnm", "per_sample": True}]
)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_off_equals_stock_bit_for_bit(cls, off, spacing):
    shifted, stock = cls(timestep_spacing=spacing, **off), STOCK[cls](timestep_spacing=spacing)
    stock.conditioning = None
    assert torch.equal(run(shifted, latents(), steps=7), run(stock, latents(), steps=7))


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("variant", ["paper", "pnm", "adm", "constant"])
def test_on_changes_the_result(cls, variant):
    stock = STOCK[cls]()
    stock.conditioning = None
    assert not torch.equal(run(cls(window=40, variant=variant), latents()), run(stock, latents()))


def test_a_sample_of_another_time_is_treated_as_of_that_time():
    """Rescaled to the variance of another time in the window, a sample moves there exactly.

    The step after is that of stock DDIM from that time to the grid's next.
    """
    scheduler = TimeShiftDDIMScheduler(window=60, cutoff=0, clip_sample=False)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod
    expected = 1 - alphas
    x = latents()[1:2] * expected[730].sqrt()  # unit variance before

    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    # Any network output that makes the first step, from 900, arrive at exactly this x.
    start = (x - (1 - alphas[800]).sqrt() * out) / alphas[800].sqrt()
    start = alphas[900].sqrt() * start + (1 - alphas[900]).sqrt() * out
    arrived = scheduler.step(out, scheduler.timesteps[0], start).prev_sample
    assert torch.allclose(arrived, x, atol=1e-4)
    assert scheduler.timesteps[:3].tolist() == [900, 770, 700]  # 730 is outside of 770..830

    wide = TimeShiftDDIMScheduler(window=160, cutoff=0, clip_sample=False)
    wide.set_timesteps(10)
    wide.step(out, wide.timesteps[0], start)
    assert wide.timesteps[:3].tolist() == [900, 730, 700]
    stepped = wide.step(out, wide.timesteps[1], x).prev_sample
    x0 = (x - (1 - alphas[730]).sqrt() * out) / alphas[730].sqrt()
    assert torch.allclose(stepped, alphas[700].sqrt() * x0 + (1 - alphas[700]).sqrt() * out)
    assert wide.timesteps[1] == 800  # the grid again, once used


def test_constant_is_half_a_window_always():
    told = []
    run(TimeShiftDDIMScheduler(window=40, cutoff=300, variant="constant"), latents(), told=told)
    assert told == [900, 820, 720, 620, 520, 420, 300, 200, 100, 0]


def test_adm_goes_by_the_official_stride():
    """At 10 steps it is 1000 // 9 = 111 from the time found, not 100."""
    scheduler = TimeShiftDDIMScheduler(window=2, cutoff=0, variant="adm", clip_sample=False)
    scheduler.set_timesteps(10)
    x, out = latents(), latents().flip(-1)
    alphas = scheduler.alphas_cumprod
    scheduler.step(out, 900, x)  # the first step never shifts
    found = int(scheduler._nearest(x, 800))
    assert 799 <= found <= 801
    stepped = scheduler.step(out, 800, x).prev_sample
    x0 = (x - (1 - alphas[800]).sqrt() * out) / alphas[800].sqrt()
    level = alphas[found - 111]
    assert torch.allclose(stepped, level.sqrt() * x0 + (1 - level).sqrt() * out)


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("variant", ["paper", "pnm", "adm"])
def test_per_sample_does_not_depend_on_the_batch(cls, variant):
    def scheduler():
        made = cls(window=60, variant=variant, per_sample=True)
        made.reads_conditioning = True
        return made

    together = run(scheduler(), latents())
    for i in range(3):
        alone = run(scheduler(), latents()[i : i + 1], seed=i)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-6)
    if variant == "pnm":  # control: the batch together decides otherwise
        joint = run(cls(window=60, variant=variant), latents())
        assert not torch.allclose(joint, together, atol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        TimeShiftDDIMScheduler(window=40, per_sample=True),
        TimeShiftPNDMScheduler(window=40, per_sample=True, variant="pnm"),  # inside of its moves
    ],
)
def test_per_sample_conditioning_wants_somebody_who_reads_it(scheduler):
    with pytest.raises(ValueError, match="told a time for each sample"):
        scheduler.set_timesteps(10)


def test_where_only_the_destination_shifts_nobody_has_to_read():
    for scheduler in (
        TimeShiftDDIMScheduler(window=40, per_sample=True, variant="pnm"),
        TimeShiftPNDMScheduler(window=40, per_sample=True, variant="pnm", skip_prk_steps=True),
    ):
        assert torch.isfinite(run(scheduler, latents())).all()
        assert scheduler.conditioning is None


def test_image_to_image_starts_inside_the_grid():
    """The first step is wherever the pipeline starts; the grid for add_noise stays unshifted."""
    told = []
    scheduler = TimeShiftDDIMScheduler(window=40, cutoff=0)
    run(scheduler, latents(), skip=4, told=told)
    assert told[0] == 500
    assert told[1] != 400
    assert scheduler.timesteps.tolist() == list(range(900, -1, -100))


def test_pndm_does_not_start_inside_the_grid():
    """The stock one is a level off there: of a sample that should shrink to 0.5 more is left."""
    stock = PNDMScheduler(skip_prk_steps=True)
    stock.set_timesteps(20)
    alphas = stock.alphas_cumprod.double()
    left = []
    for skip in (0, 10):
        t = stock.timesteps[skip]
        x = (0.25 * alphas[t] + 1 - alphas[t]).sqrt().view(1, 1, 1, 1)
        stock.set_timesteps(20)
        for t in stock.timesteps[skip:]:
            x = stock.step(gaussian_eps(alphas)(x, t), t, x).prev_sample
        left.append(abs(float(x) - 0.5))
    assert left[1] > 10 * left[0], "diffusers serves it now: allow it"
    with pytest.raises(ValueError, match="image to image"):
        run(TimeShiftPNDMScheduler(window=40, skip_prk_steps=True), latents(), skip=4)


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("name", ["step", "set_timesteps"])
def test_pipelines_see_the_stock_signatures(cls, name):
    """They pass a generator, eta or timesteps only to who names them."""
    ours, stock = (inspect.signature(getattr(c, name)) for c in (cls, STOCK[cls]))
    assert ours == stock


@pytest.mark.parametrize("cls", STOCK)
def test_a_scheduler_can_be_used_again(cls):
    scheduler = cls(window=40)
    first = run(scheduler, latents())
    scheduler.set_timesteps(10)
    scheduler.step(latents(), scheduler.timesteps[0], latents() * 0.7)  # a run that was left
    assert torch.equal(run(scheduler, latents()), first)


@pytest.mark.parametrize("cls", STOCK)
def test_settings_and_tensors_survive_saving(cls, tmp_path):
    stock = STOCK[cls](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    made = cls.from_config(stock.config, window=30, cutoff=250, variant="pnm")
    made.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for scheduler in (made, loaded):
        assert torch.equal(scheduler.alphas_cumprod, stock.alphas_cumprod)
        kept = {name: scheduler.config[name] for name in cls.settings}
        assert kept == cls.settings | {"window": 30, "cutoff": 250, "variant": "pnm"}
    back = STOCK[cls].from_config(loaded.config)
    assert torch.equal(back.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": -1}, "window = -1"),
        ({"window": 1}, "window = 1"),
        ({"variant": "adm", "variance_model": "signal", "v0": 0.3}, "without v0"),
        ({"variant": "papers"}, "one of paper, pnm"),
        ({"variance_model": "data"}, "one of noise, signal"),
        ({"variance_model": "signal"}, "v0 = None"),
        ({"variance_model": "signal", "v0": 1.0}, "does not tell time"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        TimeShiftDDIMScheduler(**settings)


def test_a_class_of_ours_can_be_subclassed():
    class Listens(TimeShiftDDIMScheduler):
        heard = 0

        def step(self, *args, **kwargs):
            self.heard += 1
            return super().step(*args, **kwargs)

    ours = Listens.from_config(TimeShiftDDIMScheduler(beta_start=0.001).config, window=40)
    plain = TimeShiftDDIMScheduler(beta_start=0.001, window=40)
    assert_equal(run(ours, latents()), run(plain, latents()), "a subclass")
    assert (ours.config.window, ours.heard) == (40, 10)


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("per_sample", [False, True])
def test_half_precision_stays_half(cls, per_sample):
    """Also below the cutoff, where PNDM remembers wide outputs of shifted steps."""
    scheduler = cls(window=40, variant="pnm", per_sample=per_sample, cutoff=400)
    scheduler.reads_conditioning = True
    scheduler.set_timesteps(10)
    x = latents().half()
    for t in scheduler.timesteps:
        out = scheduler.step(x, t, x)
        assert {part.dtype for part in out.values()} == {torch.float16}
        x = out.prev_sample
    assert scheduler.shifts > 0


@pytest.mark.parametrize("cls", STOCK)
@pytest.mark.parametrize("variant", ["paper", "pnm", "adm"])
def test_windows_wider_than_two_strides_never_go_up(cls, variant):
    """Ten steps apart, of samples that always look noisier or cleaner than the window holds."""
    for size in (0.1, 10.0):
        scheduler = cls(window=400, cutoff=0, variant=variant)
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * latents(), t, size * latents())[0]
            assert x.isfinite().all()
            starts, moves = scheduler._start, scheduler._at + 1
            if starts is not None:
                assert starts >= scheduler._move(moves).target
            for to in scheduler._inside.values():
                assert to <= scheduler._move(scheduler._at).source


def test_only_steps_at_other_times_count_as_shifted():
    scheduler = TimeShiftDDIMScheduler(window=2, cutoff=0, clip_sample=False, variant="pnm")
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[:-2]:
        found = int(scheduler._nearest(latents(), int(t) - 100))
        before = int(scheduler.shifts)
        scheduler.step(latents(), t, latents())
        moved = t != 900 and found != int(t) - 100
        assert int(scheduler.shifts) - before == moved
    exact = latents()[1:2] * (1 - scheduler.alphas_cumprod[700]).sqrt()
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[:2]:
        scheduler.step(exact, t, exact)
    assert int(scheduler.shifts) == 0, "the variance is that of the grid's time"


def test_a_run_ends_with_its_grid():
    scheduler = TimeShiftDDIMScheduler(window=40)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="998 is no time of the grid"):
        scheduler.step(latents(), 998, latents())
    for t in scheduler.timesteps:
        scheduler.step(latents(), t, latents())
    with pytest.raises(ValueError, match="grid's end"):
        scheduler.step(latents(), scheduler.timesteps[0], latents())


def test_a_stock_pipeline_is_saved_and_loaded_with_it(tmp_path):
    """Not DDIMPipeline: it makes a DDIMScheduler of whatever it is built with."""
    host = tiny("dit")
    stock = host.pipe.scheduler.config
    host.pipe.scheduler = TimeShiftDDIMScheduler.from_config(stock, window=200, cutoff=0)
    before = host.run()
    host.pipe.save_pretrained(tmp_path)
    host.pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(host.pipe.scheduler) is TimeShiftDDIMScheduler
    host.pipe.set_progress_bar_config(disable=True)
    assert_equal(before, host.run(), "after saving and loading")
    host.pipe.scheduler = DDIMScheduler.from_config(stock)
    assert not torch.equal(before, host.run())
