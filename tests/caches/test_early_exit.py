"""EarlyExit: its maths, conformance, what stands in for the rest, calibration and training."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch

from accel.artifact import Artifact, ArtifactRef
from accel.clock import sampling_grid
from accel.denoiser import denoisers
from accel.measure import mean_psnr, pipeline_samples
from accel.method import Recipe, attached
from accel.testing import assert_equal, assert_same_state, checks, conform, host_state
from accel.tiny import tiny
from caches._drift import Drift
from caches._exit_calibration import (
    _Probe,
    aged,
    chosen_depths,
    chosen_depths_of_kept,
    harm,
    spaced_exits,
)
from caches._exits import ExitHeads, as_schedule, depths_of, exit_columns, used_later
from caches._from_artifact import OnGrid
from caches._outputs import leaves
from caches.early_exit import EarlyExit, ExitTraining
from caches.interval import IntervalCache
from caches.router import RouterCache
from caches.schedule import Schedule, constant, of_artifact, resampled, to_artifact
from caches.token_merge import TokenMerge

# a schedule without exits says that it changes nothing
pytestmark = pytest.mark.filterwarnings("ignore::accel.method.NoEffectWarning")
TRANSFORMERS = ["dit", "pixart", "sd3", "flux", "wan", "wan22", "cogvideox", "hunyuanvideo", "ltx"]
RESTS = ["skip", "residual", "forecast", "heads"]
STEPS = 6
INPUTS = [
    {"class_labels": [i, i + 3], "num_inference_steps": STEPS, "guidance_scale": 3.0}
    for i in (1, 2)
]
FOLDERS: list = []


@pytest.fixture(scope="session", autouse=True)
def _folder(tmp_path_factory):
    FOLDERS.append(tmp_path_factory.mktemp("exits"))


def width(name: str) -> int:
    """Channels of a tiny pipeline's tokens."""
    host, seen = tiny(name), []
    block = denoisers(host.pipe)[0].module.get_submodule(denoisers(host.pipe)[0].blocks[0].path)
    hook = block.register_forward_pre_hook(
        lambda m, a, k: seen.append((a or (k["hidden_states"],))[0].shape[-1]), with_kwargs=True
    )
    host.run()
    hook.remove()
    return seen[0]


@cache
def grid(name: str, steps: int) -> tuple[float, ...]:
    """Noise levels of a tiny pipeline's run."""
    host = tiny(name)
    with attached(_Probe(), host.pipe) as live:
        host.run(num_inference_steps=steps)
        return live.grid


@cache
def exiting(
    name: str, rest: str, depths: tuple[int, ...], on_grid: OnGrid = "resample"
) -> EarlyExit:
    """The method with these depths, a step each; its heads are random."""
    pipe = tiny(name).pipe
    made = to_artifact(
        as_schedule(exit_columns(pipe), depths),
        denoisers(pipe)[0],
        method=EarlyExit.name(),
        grid=grid(name, len(depths)),
        settings={"rest": rest, "exits": [1]},
    )
    if rest == "heads":
        heads = ExitHeads([1], width(name))
        generator = torch.Generator().manual_seed(0)
        for parameter in heads.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        made.tensors |= heads.tensors()
    file = FOLDERS[0] / f"{name}-{rest}-{'.'.join(map(str, depths))}.safetensors"
    return EarlyExit(made.save(file), on_grid)


def blocks(name: str) -> int:
    return len(denoisers(tiny(name).pipe)[0].blocks)


# -- the maths --------------------------------------------------------------------------------


def test_exits_are_spread_over_the_blocks():
    assert spaced_exits(6) == (1, 2, 3, 4, 5)
    assert spaced_exits(28) == (1, 5, 10, 14, 18, 23, 27)
    assert spaced_exits(2) == (1,)
    assert spaced_exits(6, first=0) == (0, 1, 2, 3, 4, 5)
    assert spaced_exits(28, 3) == (1, 14, 27)


def test_harm_is_linear_in_the_level_and_the_length():
    answers = np.array([[4.0, 2.0], [2.0, 0.0]])
    found = harm(answers, [0.8, 0.4], [0.9, 0.6, 0.4])
    assert found == pytest.approx(np.array([[4 * 0.3, 2 * 0.3], [3 * 0.2, 1 * 0.2], [0.8, 0.0]]))


def test_least_harm_and_price():
    harms = np.array([[0.5, 0.2, 0.1], [0.1, 0.3, 0.3], [0.9, 0.9, 0.9]])
    # exits 1, 3, 5 of 6 blocks at 0.1 a block: the first step costs 0.6, 0.5, 0.6, in full 0.6
    assert chosen_depths(harms, (1, 3, 5), 6, 0.1) == (3, 1, 6)
    assert chosen_depths(harms, (1, 3, 5), 6, 0.0) == (6, 6, 6)
    assert chosen_depths(0 * harms, (1, 3, 5), 6, 0.0) == (6, 6, 6)


def test_depths_fall_as_the_price_rises():
    harms = np.random.default_rng(0).random((20, 5))
    found = [chosen_depths(harms, range(1, 6), 6, price) for price in np.linspace(0, 1.1, 25)]
    for careful, bold in itertools.pairwise(found):
        assert all(a >= b for a, b in zip(careful, bold, strict=True))
    assert found[0] == (6,) * 20
    assert found[-1] == (1,) * 20


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("price", [0.0, 0.02, 0.05, 0.1, 0.5])
def test_what_is_kept_gets_older(price, order):
    """Against all schedules of five steps, two exits and three blocks."""
    shares = [1.0, 0.9, 0.8, 0.5, 0.4]
    harms, exits = np.random.default_rng(1).random((5, 2)), (1, 2)

    def cost(depths):
        total, full = 0.0, []
        for step, depth in enumerate(depths):
            total += price * depth
            if depth == 3:
                full.append(step)
            elif len(full) <= order:
                return np.inf
            else:
                age = np.prod([shares[k] - shares[step] for k in full[-1 - order :]])
                total += harms[step, exits.index(depth)] * age
        return total

    every = itertools.product((1, 2, 3), repeat=5)
    found = chosen_depths_of_kept(harms, aged(shares, order), exits, 3, price)
    assert cost(found) == pytest.approx(min(map(cost, every)))
    assert price > 0 or found == (3,) * 5
    assert price < 0.5 or sum(found) < 12


def test_exits_of_later_steps():
    found = used_later((6, 2, 3, 6, 4, 4), 6)
    assert found == [{2, 3, 4}, {3, 4}, {4}, {4}, {4}, set()]


def test_depths_and_schedules():
    columns = ("a.0", "a.1", "a.2", "b.0", "b.1", "b.2")
    schedule = as_schedule(columns, (3, 1))
    assert schedule.rows == ("CCCCCC", "CSSCSS")
    assert depths_of(schedule, "b") == (3, 1)
    assert depths_of(Schedule(columns[:3], ("SSS", "CCC")), "a") == (0, 3)
    for rows in (("SCC",), ("CSC",), ("CRR",)):
        with pytest.raises(ValueError, match="others than the last blocks"):
            depths_of(Schedule(columns[:3], rows), "a")


def test_a_finer_grid_skips_only_between_two_steps_that_do():
    schedule = as_schedule(("a.0", "a.1"), (2, 1, 1, 2))
    there = resampled(schedule, (8.0, 4.0, 2.0, 1.0), (8.0, 6.5, 4.0, 2.8, 2.0, 1.3, 1.0))
    depths = depths_of(there, "a")
    assert depths == (2, 2, 1, 1, 1, 2, 2)  # 6.5 lies beside a full step
    assert resampled(schedule, (8.0, 4.0, 2.0, 1.0), (8.0, 4.0, 2.0, 1.0)) == schedule


def test_heads_by_hand():
    heads = ExitHeads([2, 4], 3)
    x = torch.randn(2, 5, 3)
    assert_equal(heads(x, 4, 0.3), x, "an untrained head")
    with torch.no_grad():
        heads.weight[1], heads.bias[1] = torch.eye(3), torch.tensor([1.0, 0.0, 0.0])
        heads.modulation[1, 0] = torch.tensor([1.0] * 3 + [0.5] * 3 + [2.0] * 3)  # of every level
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    made = (1 + 2.0) * ((1 + 1.0) * normed + 0.5) + torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(heads(x, 4, 0.3), x + made, atol=1e-5)
    assert_equal(heads(x, 2, 0.3), x, "the other head")


# -- on pipelines -----------------------------------------------------------------------------


@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize(
    ("name", "rest"), [("dit", "residual"), ("flux", "heads"), ("wan", "forecast")]
)
def test_conformance(check, name, rest):
    full = blocks(name)
    conform(check, exiting(name, rest, (full, full, 1, 1)), name)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks())
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("rest", RESTS)
def test_conformance_matrix(check, name, rest):
    full = blocks(name)
    conform(check, exiting(name, rest, (full, full, 1, 1)), name)


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_exits_on_every_transformer(name, rest):
    host, full = tiny(name), blocks(name)
    plain = host.run(num_inference_steps=4)
    with attached(exiting(name, rest, (full,) * 4, "error"), host.pipe) as live:
        assert_equal(plain, host.run(num_inference_steps=4), "without exits")
        assert live.report()["effect"] == "none"
    with attached(exiting(name, rest, (full, full, 1, 1), "error"), host.pipe) as live:
        left = host.run(num_inference_steps=4)
        report = live.report()["runs"][0]
    # the second model of a pair has nothing kept yet where it takes over
    kept = {"residual": 1 / 2, "forecast": 0}.get(rest, 1) if name == "wan22" else 1
    share = report["skipped"] / (report["skipped"] + report["computed"])
    assert share == pytest.approx(kept * (full - 1) / full / 2)
    assert ("forced" in report["detail"]) == (kept < 1)
    assert report["fallbacks"] == {}
    assert report["syncs"] <= 1  # DDIM tells no beginning: the clock reads it once
    assert (report["bytes_host"] > 0) == (rest in ("residual", "forecast"))
    assert torch.isfinite(left).all()
    assert torch.equal(plain, left) == (kept == 0)


def test_what_the_first_of_two_denoisers_kept_is_let_go():
    host, full, held = tiny("wan22"), blocks("wan22"), []
    with attached(exiting("wan22", "residual", (full, 1, full, 1)), host.pipe) as live:
        live.clock.subscribe(lambda event: held.append({key[0] for key in live.kept_of}))
        host.run(num_inference_steps=4)
    assert {"transformer"} in held
    assert {"transformer_2"} in held
    assert max(map(len, held)) == 1


def _outputs(host, method, depths):
    """What the transformer of DiT returns at each step for fixed inputs, under the method."""
    transformer = host.pipe.transformer
    side, generator = transformer.config.sample_size, torch.Generator().manual_seed(1)
    found = []
    with attached(method, host.pipe) as live, torch.no_grad():
        host.pipe.scheduler.set_timesteps(len(depths))
        for step, t in enumerate(host.pipe.scheduler.timesteps):
            x = torch.randn(2, 4, side, side, generator=generator)
            with live.clock.at(step):
                found.append(
                    transformer(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample
                )
        live.clock.end()
    return found


def _tokens(host, depths):
    """Tokens behind every block, step by step, and what the last layers make of others."""
    transformer, found = host.pipe.transformer, []
    hooks = [
        block.register_forward_hook(lambda m, a, out: found.append(out))
        for block in transformer.transformer_blocks
    ]
    _outputs(host, Recipe(()), depths)
    for hook in hooks:
        hook.remove()
    count = len(transformer.transformer_blocks)
    return [found[i : i + count] for i in range(0, len(found), count)]


@pytest.mark.parametrize("rest", RESTS)
def test_what_stands_in(rest):
    """Against hooks: the tokens that reach the last layers."""
    host, count = tiny("dit"), blocks("dit")
    depths = (count, count, 1, 1)
    tokens = _tokens(host, depths)
    seen = []
    hook = host.pipe.transformer.norm_out.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    method = exiting("dit", rest, depths)
    _outputs(host, method, depths)
    hook.remove()
    heads = Artifact.load(method.artifact)
    pipe = host.pipe
    shares = [s / (1 + s) for s in sampling_grid(pipe.scheduler)[1]]
    for step, depth in enumerate(depths):
        want = tokens[step][depth - 1]
        older, newest = (tokens[k][-1] - tokens[k][depth - 1] for k in (0, 1))
        if depth < count and rest == "residual":
            want = want + newest
        if depth < count and rest == "forecast":
            along = (shares[step] - shares[1]) / (shares[1] - shares[0])
            want = want + newest + along * (newest - older)
        if depth < count and rest == "heads":
            want = ExitHeads.of(heads.tensors, [1])(want, 1, shares[step])
        assert torch.allclose(seen[step], want, atol=1e-5), step


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_residual_completes_what_was_just_computed(name, depth):
    """The same call twice: left early, it returns what it returned in full."""
    host, calls = tiny(name), []
    denoiser = denoisers(host.pipe)[0]
    hook = denoiser.module.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    host.run(num_inference_steps=2)
    hook.remove()
    args, kwargs = calls[0]
    method, found = exiting(name, "residual", (blocks(name), depth)), []
    with attached(method, host.pipe) as live, torch.no_grad():
        live.clock.begin(host.pipe.scheduler)
        for step in (0, 1):
            with live.clock.at(step):
                found.append(leaves(denoiser.module(*args, **kwargs))[0])
        live.clock.end()
        report = live.report()["runs"][0]
    assert report["skipped"] == blocks(name) - depth
    scale = found[0].abs().max()
    assert (found[0] - found[1]).abs().max() <= 1e-5 * scale  # a + (b - a) for b, in float32


def test_branches_leave_together():
    host = tiny("wan")
    with attached(exiting("wan", "skip", (1, blocks("wan"))), host.pipe) as live:
        depths: dict = {}
        patch, clock = live.patch, live.clock

        def look(call_next, *args, **kwargs):
            key = (clock.now.branch, clock.now.step)
            depths[key] = depths.get(key, 0) + 1
            return call_next(*args, **kwargs)

        for block in host.pipe.transformer.blocks:
            patch.around_call(block.attn1, look)
        host.run(num_inference_steps=2)
    assert {b for b, _ in depths} == {"cond", "uncond"}
    for branch in ("cond", "uncond"):
        assert [depths[branch, step] for step in (0, 1)] == [1, blocks("wan")]


def test_the_second_model_of_a_pair_may_stay_as_it_is():
    host = tiny("wan22")
    with attached(exiting("wan", "skip", (1, 1, 1, 1)), host.pipe) as live:
        host.run(num_inference_steps=4)
        report = live.report()["runs"][0]
    assert 0 < report["computed"] < report["calls"]  # one block a call of the first one


def test_a_residual_that_is_missing_is_computed():
    """In mid-schedule, and where the batch changes."""
    host, count = tiny("dit"), blocks("dit")
    transformer = host.pipe.transformer
    method = exiting("dit", "residual", (count, 1, 1, 1))
    for first, rows, forced in ((0, (2, 2, 2, 2), 0), (1, (2, 2, 2), 1), (0, (4, 4, 2, 2), 1)):
        with attached(method, host.pipe) as live, torch.no_grad():
            host.pipe.scheduler.set_timesteps(4)
            for step, n in enumerate(rows, first):
                side = transformer.config.sample_size
                x, labels = torch.randn(n, 4, side, side), torch.zeros(n).long()
                with live.clock.at(step):
                    transformer(x, timestep=torch.tensor([5]), class_labels=labels)
            live.clock.end()
            report = live.report()["runs"][0]
        assert report["detail"].get("forced", 0) == forced
        assert report["skipped"] == (3 - forced) * (count - 1)


@pytest.mark.parametrize("rest", ["forecast", "heads"])
def test_compiled_as_one_graph(rest):
    depths = (blocks("dit"), blocks("dit"), 1, 1)
    want = _outputs(tiny("dit"), exiting("dit", rest, depths), depths)
    host = tiny("dit")
    torch.compiler.reset()
    host.pipe.transformer.compile(backend="eager", fullgraph=True)
    found = _outputs(host, exiting("dit", rest, depths), depths)
    for a, b in zip(want, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    torch.compiler.reset()


def test_another_grid():
    host, count = tiny("dit"), blocks("dit")
    method = exiting("dit", "skip", (count, 1, 1, count), "error")
    with (
        attached(method, host.pipe),
        pytest.raises(ValueError, match="4 steps, on other noise levels"),
    ):
        host.run(num_inference_steps=7)
    with attached(EarlyExit(method.artifact), host.pipe) as live:
        host.run(num_inference_steps=7)
        report = live.report()["runs"][0]
    assert report["detail"]["resampled"] == [4, 7]
    assert 0 < report["skipped"] < 7 * (count - 1)


def test_with_other_methods():
    count = blocks("wan")
    method = exiting("wan", "residual", (count, 1, count, 1))
    host = tiny("wan")
    with attached(Recipe((TokenMerge(1.0), method)), host.pipe) as live:
        host.run(num_inference_steps=4)
        assert [m["effect"] for m in live.report()["members"]] == ["some", "some"]
    with pytest.raises(ValueError, match=r"both claim 'block.skip' at 'transformer\."):
        Recipe((IntervalCache(2), method)).attach(host.pipe)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="EarlyExit cannot go on UNet"):
        exit_columns(tiny("sd").pipe)
    method = exiting("dit", "skip", (2, 1))
    with pytest.raises(ValueError, match="it is for DiT"):
        method.attach(tiny("pixart").pipe)
    pipe = tiny("dit").pipe
    columns, denoiser = exit_columns(pipe), denoisers(pipe)[0]
    other = to_artifact(
        constant(columns, 2), denoiser, method="caches.router:RouterCache", grid=[2, 1]
    )
    with pytest.raises(ValueError, match=r"is for caches.router:RouterCache, not for"):
        EarlyExit(other.save(tmp_path / "other.safetensors")).attach(pipe)
    with pytest.raises(ValueError, match=r"is for caches.early_exit:EarlyExit, not for"):
        RouterCache(exiting("dit", "forecast", (2, 1)).artifact).attach(pipe)  # would only skip
    with pytest.raises(ValueError, match=r"exits \[2\] without a head"):
        exiting("dit", "heads", (3, 2)).attach(pipe)
    given = INPUTS[:1]
    for wrong, words in (
        ({}, "for a speed or for a quality"),
        ({"quality": 30.0, "speed": 2.0}, "for a speed or for a quality"),
        ({"quality": 30.0, "rest": "heads"}, "skip, residual, forecast or trained heads"),
        ({"quality": 30.0, "rest": other}, "skip, residual, forecast or trained heads"),
        ({"quality": 1e6}, "no exits give"),
        ({"speed": 1e6}, "no exits give"),
    ):
        with pytest.raises(ValueError, match=words):
            EarlyExit.calibrate(pipe, given, **wrong)
    with pytest.raises(ValueError, match="same number of steps"):
        EarlyExit.calibrate(pipe, [], quality=30.0)


# -- calibration and training -----------------------------------------------------------------


@pytest.mark.parametrize("rest", ["skip", "forecast"])
def test_a_calibration_keeps_the_quality_it_was_asked_for(rest, tmp_path):
    pipe = tiny("dit").pipe
    state = host_state(pipe)
    plain, work = [pipeline_samples(pipe, x, i) for i, x in enumerate(INPUTS)], {}
    for quality in (22.0, 40.0):
        artifact = EarlyExit.calibrate(pipe, INPUTS, rest=rest, quality=quality)
        method = EarlyExit(artifact.save(tmp_path / f"{quality}.safetensors"), on_grid="error")
        with attached(method, pipe, strict=True):
            made = [pipeline_samples(pipe, x, i) for i, x in enumerate(INPUTS)]
        assert sum(map(mean_psnr, made, plain)) / 2 >= quality
        work[quality] = of_artifact(artifact).share()
    assert work[22.0] <= work[40.0] < 1
    assert_same_state(state, host_state(pipe))


@pytest.mark.parametrize("speed", [1.1, 1.4])
def test_a_calibration_finds_a_speed(speed, monkeypatch):
    """With blocks and everything else of a second each, of which two in four can be left out."""

    def drift(pipe, arguments, columns):
        return Drift(seconds=dict.fromkeys(columns, 1.0), rest=1.0)

    monkeypatch.setattr("caches._exit_calibration.measure_drift", drift)
    found = of_artifact(EarlyExit.calibrate(tiny("dit").pipe, INPUTS, rest="skip", speed=speed))
    assert blocks("dit") == 3
    computed = found.share() * STEPS * 3
    assert 4 * STEPS / (STEPS + computed) >= speed
    assert computed >= STEPS  # no exit before the first block


TRAINING = ExitTraining(updates=40)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pipe = tiny("dit").pipe
    state = host_state(pipe)
    artifact = TRAINING.fit(pipe, INPUTS, str(tmp_path_factory.mktemp("training")))
    assert_same_state(state, host_state(pipe))
    assert all(p.grad is None for p in pipe.transformer.parameters())
    return artifact


def test_trained_heads_are_nearer_than_none(trained, tmp_path):
    """On noise that the training has not seen, leaving behind the first block at every step."""
    assert trained.match == "weights"
    host = tiny("dit")
    errors = {}
    call = {**INPUTS[0], "class_labels": [7, 8]}
    plain = pipeline_samples(host.pipe, call, 10**6)
    for rest in ("skip", "heads"):
        made = to_artifact(
            as_schedule(exit_columns(host.pipe), (1,) * STEPS),
            denoisers(host.pipe)[0],
            method=EarlyExit.name(),
            grid=trained.grid,
            settings={"rest": rest, "exits": trained.settings["exits"]},
        )
        made.tensors |= {k: v for k, v in trained.tensors.items() if k.startswith("heads.")}
        with attached(EarlyExit(made.save(tmp_path / f"{rest}.safetensors")), host.pipe):
            errors[rest] = (pipeline_samples(host.pipe, call, 10**6) - plain).square().mean()
    assert errors["heads"] < 0.75 * errors["skip"]


def test_heads_are_calibrated_and_tied_to_their_weights(trained, tmp_path):
    pipe = tiny("dit").pipe
    artifact = EarlyExit.calibrate(pipe, INPUTS, rest=trained, quality=25.0)
    ref = artifact.save(tmp_path / "heads.safetensors")
    with attached(EarlyExit(ref, on_grid="error"), pipe, strict=True):
        pipeline_samples(pipe, INPUTS[0], 0)
    assert torch.equal(artifact.tensors["heads.weight"], trained.tensors["heads.weight"])
    with pytest.raises(ValueError, match="does not fit: weight"):
        EarlyExit(ref).attach(tiny("dit", seed=1).pipe)
    # as it was trained it leaves nothing out
    neutral = EarlyExit(trained.save(tmp_path / "trained.safetensors"))
    plain = pipeline_samples(pipe, INPUTS[0], 0)
    with attached(neutral, pipe):
        assert_equal(plain, pipeline_samples(pipe, INPUTS[0], 0), "heads without exits")


@pytest.mark.parametrize("name", ["flux", "wan", "sd3", "cogvideox"])
def test_training_on_other_transformers(name, tmp_path, monkeypatch):
    monkeypatch.setattr("caches._resuming.inputs_digest", lambda inputs: "tensors")
    monkeypatch.setattr("caches.early_exit.inputs_digest", lambda inputs: "tensors")
    host = tiny(name)
    given = {k: v for k, v in host.inputs.items() if k not in ("generator", "output_type")}
    artifact = ExitTraining(updates=2).fit(host.pipe, [given], str(tmp_path))
    assert artifact.tensors["heads.bias"].abs().max() > 0
    assert artifact.tensors["heads.modulation"].isfinite().all()


def test_a_training_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    short = ExitTraining(updates=4)
    whole = short.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "whole"))
    original = pipeline_samples
    seeds = []

    def cut(pipe, arguments, seed):
        seeds.append(seed)
        if len(seeds) == 4:  # the first is to look
            raise KeyboardInterrupt
        return original(pipe, arguments, seed)

    monkeypatch.setattr("caches._exit_training.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("caches._exit_training.pipeline_samples", cut)
    with pytest.raises(KeyboardInterrupt):
        short.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    seeds.clear()
    monkeypatch.setattr(
        "caches._exit_training.pipeline_samples", lambda *a: (seeds.append(a[2]), original(*a))[1]
    )
    resumed = short.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    assert seeds == [0, 2, 3]
    for name, value in whole.tensors.items():
        assert torch.equal(value, resumed.tensors[name]), name
    with pytest.raises(ValueError, match="other inputs or settings"):
        ExitTraining(updates=5).fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    with pytest.raises(ValueError, match="another model"):
        short.fit(tiny("dit", seed=1).pipe, INPUTS, str(tmp_path / "cut"))


@pytest.mark.parametrize("settings", [{"updates": 0}, {"lr": 0.0}, {"most": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="wants updates"):
        ExitTraining(**settings)


def test_training_wants_one_stack(tmp_path):
    with pytest.raises(ValueError, match="one denoiser"):
        ExitTraining().fit(tiny("wan22").pipe, INPUTS, str(tmp_path))
    with pytest.raises(ValueError, match="one denoiser"):
        ExitTraining().fit(tiny("dit").pipe, [], str(tmp_path))


def test_a_reference_that_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        EarlyExit(ArtifactRef(str(tmp_path / "none"), "0")).attach(tiny("dit").pipe)
