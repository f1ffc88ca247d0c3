"""Correctors against densities that are known exactly, and on pipelines."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from accel.testing import assert_same_state, host_state, tiny
from samplers.search.budget import Budget, Cost
from samplers.search.conduct import SearchSettings
from samplers.search.correctors import Correctors
from samplers.search.levels import Levels
from samplers.search.noise import gaussian, key
from samplers.search.path import Draw, Run, path_json, read_path
from samplers.search.player import Player
from samplers.search.session import PLAIN
from samplers.search.smc import Population
from samplers.search.verifiers.pixels import Brightness

COUNT, RUNS = 512, 6
# means and variances of the two models' data
FIRST, SECOND = (-1.0, 1.0), (1.5, 0.25)


def corrected(betas, *, weighed=True, eta=1.0, steps=200, scheduler=None):
    """Weighted mean and spread of samples of q_1^b_1 q_2^b_2, with exact denoisers of both."""
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    levels, means, squares = Levels.of(scheduler), [], []
    for run in range(RUNS):
        x = gaussian(key(run), (COUNT, 1)).double() * levels.table[0][1] / sum(betas) ** 0.5
        population = Population(COUNT)
        for step in range(steps):
            alpha, s = levels.table[step]
            parts = [m + v * alpha * (x - alpha * m) / (v * alpha**2 + s**2)
                     for m, v in (FIRST, SECOND)]  # fmt: skip
            clean, gained = levels.mixed(parts, x, step, betas)
            fresh = gaussian(key(run, step), (COUNT, 1)).double()
            own = levels.mixed_eta(step, eta, betas)
            x = levels.follow(x.double(), clean.double(), step, eta=own, fresh=fresh)
            if weighed and step + 1 < steps:
                population.weigh(gained.numpy())
                chosen = population.resample(key(run, step, "spot") / 2**63)
                x = x if chosen is None else x[torch.from_numpy(chosen)]
        w = population.weights()
        means.append(float(w @ x[:, 0].numpy()))
        squares.append(float(w @ x[:, 0].numpy() ** 2))
    mean = float(np.mean(means))
    return mean, float(np.mean(squares) - mean**2) ** 0.5


def target(betas):
    """Of Gaussians, in closed form: precisions add up, weighted."""
    precision = sum(b / v for b, (_, v) in zip(betas, (FIRST, SECOND), strict=True))
    mean = sum(b * m / v for b, (m, v) in zip(betas, (FIRST, SECOND), strict=True)) / precision
    return mean, precision**-0.5


CASES = {"product": (1.0, 1.0), "guidance": (-1.0, 2.0), "power": (3.0, 0.0), "between": (0.5, 0.5)}


@pytest.mark.parametrize("betas", CASES.values(), ids=CASES.keys())
def test_corrected_particles_reach_the_target(betas):
    """6 populations of 512: the standard errors of mean and sd are below sd / 50."""
    mean, sd = corrected(betas)
    wanted, spread = target(betas)
    assert mean == pytest.approx(wanted, abs=0.05)
    assert sd == pytest.approx(spread, abs=0.05)


@pytest.mark.parametrize("name", ["product", "guidance", "power"])
def test_without_weights_the_target_is_missed(name):
    """The control: what adding up scores alone gives."""
    mean, sd = corrected(CASES[name], weighed=False)
    wanted, spread = target(CASES[name])
    assert max(abs(mean - wanted), abs(sd - spread)) > 0.08


def test_less_noise_in_the_steps_has_the_same_limit():
    """Nearer to it only in more steps: at 200 the mean is 0.1 off."""
    mean, sd = corrected(CASES["guidance"], eta=0.5, steps=600)
    wanted, spread = target(CASES["guidance"])
    assert (mean, sd) == pytest.approx((wanted, spread), abs=0.06)


def test_a_variance_preserving_process_weighs_the_same():
    """Levels are compared by sigma = s / alpha, so flow and diffusion agree."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True)
    mean, sd = corrected(CASES["guidance"], scheduler=scheduler)
    wanted, spread = target(CASES["guidance"])
    assert (mean, sd) == pytest.approx((wanted, spread), abs=0.07)


def test_one_model_alone_gains_nothing():
    levels = levels_of_flow()
    x, c = torch.randn(3, 2), torch.randn(3, 2)
    clean, gained = levels.mixed([c, c], x, 4, (-1.0, 2.0))
    assert torch.allclose(clean, c, atol=1e-5)
    assert gained.abs().max() < 1e-4


def levels_of_flow():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    return Levels.of(scheduler)


def run(host, search, **more):
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    calls, settings = [{**call, "num_inference_steps": 5} | more], SearchSettings(seed=3)
    return search.run(host.pipe, calls, Brightness(), Budget(renders=100), settings=settings)


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_on_pipelines_weights_and_lineage_are_reported(name):
    host = tiny(name)
    host.run()
    state = host_state(host.pipe)
    found = run(host, Correctors(4, every=2, threshold=1.0, rounds=1), guidance_scale=3.0)
    (winner,) = found.winners
    (report,) = winner.report["populations"]
    assert report["mix"] == (-2.0, 3.0)
    assert len(report["effective"]) == len(report["spread"]) == 2
    assert min(report["spread"]) > 0
    assert sum(report["weights"]) == pytest.approx(1, abs=1e-4)
    assert winner.ledger.spent().evaluations == 4 * 5 * 2
    if name == "sd":
        assert_same_state(state, host_state(host.pipe))


def test_the_winner_is_made_again_from_its_path():
    host = tiny("sd")
    winner = run(host, Correctors(4, rounds=1), guidance_scale=3.0).winners[0]
    assert read_path(path_json(winner.path)) == winner.path
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    with Player(host.pipe, {**call, "num_inference_steps": 5, "guidance_scale": 3.0}) as player:
        again = player.frames([winner.path], PLAIN, Cost())
    assert np.array_equal(again[0], winner.frames)


def test_a_mix_as_guidance_is_the_pipelines_own():
    host = tiny("sd")
    call = {k: v for k, v in host.inputs.items() if k != "output_type"}
    call |= {"num_inference_steps": 4, "guidance_scale": 3.0}
    with Player(host.pipe, call) as player:
        ends = [
            player.reach([(Draw(1), Run(3, 1.0, 5, mix))], PLAIN, Cost())[0]
            for mix in (None, (-2.0, 3.0))
        ]
    assert ends[0].gained is None
    assert torch.allclose(ends[0].sample, ends[1].sample, atol=1e-4)


def test_without_guidance_there_is_nothing_to_correct():
    with pytest.raises(ValueError, match="guidance_scale 1 has none"):
        run(tiny("sd"), Correctors(2, rounds=1), guidance_scale=1.0)
    both = Correctors(2, "product", rounds=1)  # of the same prompt twice: its square
    winner = run(tiny("sd"), both, guidance_scale=1.0).winners[0]
    assert max(winner.report["populations"][0]["spread"]) > 1e-3


@pytest.mark.parametrize("name", ["flux", "hunyuanvideo"])
def test_guidance_that_is_embedded_is_no_guidance_of_two_branches(name):
    with pytest.raises(ValueError, match="guidance_scale 1 has none"):
        run(tiny(name), Correctors(2, rounds=1), guidance_scale=6.0, true_cfg_scale=1.0)


def test_true_guidance_is_weighed_by_its_own_scale():
    host = tiny("hunyuanvideo")
    found = run(host, Correctors(2, rounds=1), true_cfg_scale=4.0, guidance_scale=6.0)
    (report,) = found.winners[0].report["populations"]
    assert report["mix"] == (-3.0, 4.0)
    assert max(report["spread"]) > 0


def test_steps_that_are_not_guided_as_weighed_are_refused():
    with pytest.raises(ValueError, match="not guided by u"):
        run(tiny("sd"), Correctors(2, rounds=1), guidance_scale=3.0, guidance_rescale=0.7)


def test_branches_that_cannot_be_told_apart_are_refused():
    from samplers.search.branches import Branches

    branches = Branches(tiny("sd").pipe)
    branches._outputs = {"call0": torch.zeros(1, 4, 2, 2), "call1": torch.zeros(1, 4, 2, 2)}
    with pytest.raises(ValueError, match="unknown which is unconditional"):
        branches.taken(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    "bad", [{"particles": 1}, {"every": 0}, {"power": 0.0}, {"eta": 0.0}, {"clamp": -1.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="Correctors"):
        Correctors(**bad)


@pytest.mark.parametrize("mix", [[1.0], [1.0, True], ["1", 0], [1.0, -1.0], [float("inf"), 1.0], 3])
def test_wrong_mixes_are_no_paths(mix):
    with pytest.raises(ValueError, match="mix"):
        read_path([{"draw": {"key": 1}}, {"run": {"eta": 1.0, "mix": mix}}])
    with pytest.raises(ValueError, match="mix goes with eta"):
        read_path([{"draw": {"key": 1}}, {"run": {"mix": [1.0, 1.0]}}])
