"""ResidualGate: its evidence, conformance, rows that decide for themselves, calibration."""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
import torch

from accel.artifact import ArtifactRef
from accel.denoiser import denoisers
from accel.measure import mean_psnr, pipeline_samples
from accel.method import attached
from accel.testing import assert_equal, checks, conform
from accel.tiny import tiny
from caches._gating import (
    WARMUP,
    on_line,
    relative_gap,
    response_at,
    rows_of,
    slopes,
)
from caches.residual_gate import ResidualGate
from caches.schedule import constant, to_artifact

# Gates so strict that nothing is skipped say so, and tiny runs are short.
pytestmark = pytest.mark.filterwarnings("ignore::accel.method.NoEffectWarning")
FOLDERS: list = []
BOLD = 1e9  # an error that always skips


@pytest.fixture(scope="session", autouse=True)
def _folder(tmp_path_factory):
    FOLDERS.append(tmp_path_factory.mktemp("gates"))


@cache
def calibrated(name: str, quality: float = 30.0) -> ArtifactRef:
    host = tiny(name)
    given = {k: v for k, v in host.inputs.items() if k not in ("generator", "output_type")}
    given |= {"num_inference_steps": 6}
    with mock.patch("caches._drawn.inputs_digest", str):  # tiny inputs are tensors
        artifact = ResidualGate.calibrate(host.pipe, [given], quality=quality)
    artifact.inputs_sha256 = ""
    return artifact.save(FOLDERS[0] / f"{name}-{quality}.safetensors")


# -- the evidence -----------------------------------------------------------------------------


def test_gaps_are_relative_and_by_row():
    found = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    forecast = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert relative_gap(found, forecast).tolist() == pytest.approx([0.0, 0.5])
    assert relative_gap(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [0.0]


def test_a_line_is_continued_and_one_point_repeated():
    newest, older = torch.tensor([0.6, 0.6]), torch.tensor([0.8, 0.6])
    weights = slopes(newest, older, 0.5)
    assert weights.tolist() == pytest.approx([0.5, 0.0])
    values = on_line(torch.tensor([[6.0], [6.0]]), torch.tensor([[8.0], [1.0]]), weights)
    assert values.flatten().tolist() == pytest.approx([5.0, 6.0])  # 10 x place; the newest again


def test_responses_are_linear_between_what_was_measured():
    shares, responses = [0.8, 0.2], [4.0, 1.0]
    found = [response_at(s, shares, responses) for s in (0.9, 0.8, 0.5, 0.2, 0.1)]
    assert found == pytest.approx([4.0, 4.0, 2.5, 1.0, 1.0])


def test_rows_of_arguments():
    rows = torch.tensor([2])
    hidden, time = torch.arange(24.0).reshape(3, 4, 2), torch.arange(3)
    flux, ltx = (torch.ones(3, 5), torch.ones(3, 5)), (torch.ones(3, 4, 2),)
    adapter = {"ip_hidden_states": [torch.ones(3, 4, 2)]}
    given = ((hidden, None, flux), {"timestep": time, "rotary": ltx, "scale": 1.0, "ip": adapter})
    args, kwargs = rows_of(given, rows, 3)
    assert_equal(args[0], hidden[2:], "hidden states")
    assert args[1] is None
    assert [t.shape for t in args[2]] == [(3, 5), (3, 5)]  # 3 tokens, not rows
    assert kwargs["timestep"].tolist() == [2]
    assert kwargs["rotary"][0].shape == (1, 4, 2)
    assert kwargs["scale"] == 1.0
    assert kwargs["ip"]["ip_hidden_states"][0].shape == (1, 4, 2)


# -- on pipelines -----------------------------------------------------------------------------


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", ["dit", "wan", "flux"])
def test_conformance(check, name):
    conform(check, ResidualGate(calibrated(name), error=BOLD), name)


@pytest.mark.parametrize(
    "name", ["dit", "pixart", "sd3", "flux", "wan", "wan22", "cogvideox", "hunyuanvideo", "ltx"]
)
def test_it_skips_and_computes_on_every_transformer(name):
    host = tiny(name)
    plain = host.run(num_inference_steps=6)
    gate = ResidualGate(calibrated(name), error=BOLD)
    with attached(gate, host.pipe) as live:
        bold = host.run(num_inference_steps=6)
        report = live.report()["runs"][0]
    assert report["reused"] > 0
    assert report["bytes_host"] > 0 == report["bytes_device"]  # this is a CPU
    assert torch.isfinite(bold).all()
    assert not torch.equal(plain, bold)
    with attached(ResidualGate(calibrated(name), error=1e-12), host.pipe) as live:
        assert_equal(plain, host.run(num_inference_steps=6), "a gate that is never satisfied")
        assert live.report()["runs"][0]["syncs"] > 0


@pytest.mark.parametrize("name", ["dit", "flux", "wan", "sd3"])
def test_a_calibration_keeps_the_quality_it_was_asked_for(name):
    host = tiny(name)
    given = {k: v for k, v in host.inputs.items() if k not in ("generator", "output_type")}
    given |= {"num_inference_steps": 6}
    plain, found = pipeline_samples(host.pipe, given, 0), {}
    for quality in (25.0, 45.0):
        with attached(ResidualGate(calibrated(name, quality)), host.pipe) as live:
            made = pipeline_samples(host.pipe, given, 0)
            found[quality] = live.report()["runs"][0]["reused"]
        assert mean_psnr(made, plain) >= quality
    assert found[25.0] >= found[45.0]


@pytest.mark.filterwarnings("ignore::accel.method.FallbackWarning")
@pytest.mark.parametrize("without", [0, 1, -1], ids=["first", "second", "last"])
def test_calls_without_a_block_compute_and_leave_nothing_behind(without):
    """SD3's skip-layer guidance asks the network again without some of its blocks."""
    host = tiny("sd3")
    layer = range(len(host.pipe.transformer.transformer_blocks))[without]
    call = {"num_inference_steps": 6, "skip_guidance_layers": [layer]}
    call |= {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    plain = host.run(**call)
    gate = calibrated("sd3")
    with attached(ResidualGate(gate, error=1e-12), host.pipe):
        assert_equal(plain, host.run(**call), "a gate that is never satisfied")
    with attached(ResidualGate(gate, error=BOLD), host.pipe) as live:
        assert torch.isfinite(host.run(**call)).all()
        (report,) = live.report()["runs"]
    assert report["reused"] > 0
    assert bool(report["fallbacks"]) == (without == 0)


def test_what_the_first_of_two_denoisers_kept_is_let_go():
    host, held = tiny("wan22"), []
    with attached(ResidualGate(calibrated("wan22"), error=BOLD), host.pipe) as live:
        live.clock.subscribe(lambda event: held.append({key[0] for key in live.lines}))
        host.run(num_inference_steps=6)
    assert {"transformer"} in held
    assert {"transformer_2"} in held
    assert max(map(len, held)) == 1


def test_rows_decide_for_themselves():
    """A batch of which some rows compute: each row is what it is alone."""
    host = tiny("dit")
    labels, steps = [3, 5, 7], 8
    gate = ResidualGate(calibrated("dit"), error=None)

    def draw(chosen: list[int], error: float) -> tuple[torch.Tensor, dict]:
        noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        with attached(ResidualGate(gate.artifact, error), host.pipe) as live:
            out = run_with(host, noise[chosen], [labels[i] for i in chosen], steps)
            return out, live.report()["runs"][0]

    alone = {}
    for error in (10.0**-k for k in range(8)):
        together, report = draw([0, 1, 2], error)
        alone = [draw([i], error) for i in range(3)]
        for i in range(3):
            assert torch.allclose(together[i], alone[i][0][0], atol=1e-4)
        assert report["computed"] == sum(r["computed"] for _, r in alone)
        if len({r["computed"] for _, r in alone}) > 1:
            break
    else:
        raise AssertionError("no error was found at which rows differ in what they compute")


def run_with(host, noise, labels, steps):
    """The transformer driven by hand, a solver step a call, so that rows are known."""
    scheduler, transformer = host.pipe.scheduler, host.pipe.transformer
    scheduler.set_timesteps(steps)
    side, channels = transformer.config.sample_size, transformer.config.in_channels
    x = noise[:, :channels, :side, :side]
    with torch.no_grad():
        for t in scheduler.timesteps:
            time = t.expand(len(x))
            out = transformer(x, timestep=time, class_labels=torch.tensor(labels)).sample
            x = scheduler.step(out[:, :channels], t, x).prev_sample
    return x


def test_first_calls_compute_everything():
    host = tiny("dit")
    with attached(ResidualGate(calibrated("dit"), error=BOLD), host.pipe) as live:
        host.run(num_inference_steps=WARMUP)
        report = live.report()["runs"][0]
    assert report["reused"] == 0
    assert report["computed"] == report["nfe"]


def test_another_size_and_a_changed_batch_compute():
    host = tiny("dit")
    transformer = host.pipe.transformer
    with attached(ResidualGate(calibrated("dit"), error=BOLD), host.pipe) as live:
        host.pipe.scheduler.set_timesteps(5)
        side = transformer.config.sample_size
        for step, rows in enumerate((4, 4, 4, 2, 2)):
            with live.clock.at(step), torch.no_grad():
                transformer(
                    torch.randn(rows, 4, side, side),
                    timestep=torch.tensor([5]),
                    class_labels=torch.zeros(rows).long(),
                )
        live.clock.end()
        report = live.report()["runs"][0]
    assert report["reused"] == 4  # step 2; the others are new
    assert report["computed"] == 12


def test_refusals(tmp_path):
    columns, grid = ("transformer",), (1.0, 0.5)
    (denoiser,) = denoisers(tiny("dit").pipe)
    other = to_artifact(constant(columns, 2), denoiser, method="caches.router:R", grid=grid)
    with pytest.raises(ValueError, match=r"is for caches\.router:R"):
        ResidualGate(other.save(tmp_path / "r.safetensors")).attach(tiny("dit").pipe)
    with pytest.raises(ValueError, match="0 or more"):
        ResidualGate(ArtifactRef("x", "y"), -1.0)
    with pytest.raises(ValueError, match="IntervalCache"):
        ResidualGate.calibrate(tiny("sd").pipe, [{"prompt": "x"}], quality=30)
    with pytest.raises(ValueError, match="same number"):
        ResidualGate.calibrate(tiny("dit").pipe, [], quality=30)
    host = tiny("dit")
    given = [{"class_labels": [1], "num_inference_steps": 2}]
    with pytest.raises(ValueError, match="none to skip"):
        ResidualGate.calibrate(host.pipe, given, quality=30)
    with pytest.raises(ValueError, match="no threshold"):
        ResidualGate.calibrate(host.pipe, [{**given[0], "num_inference_steps": 5}], quality=1e6)
