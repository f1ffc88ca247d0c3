"""HarmoniCa: parity with the paper's formulas, training end to end, resuming."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from accel.artifact import Artifact
from accel.clock import sampling_grid
from accel.denoiser import denoisers
from accel.method import Recipe, attached
from accel.testing import assert_same_state, checks, conform, host_state, tiny
from caches._router_training import LiveWalk, Mix, RouterTraining, _Walk, frozen
from caches.router import RouterCache, RouterTrainer, routed
from caches.schedule import Schedule, module_columns, of_artifact, to_artifact
from samplers.swap import SwapScheduler

STEPS = 4
INPUTS = [
    {"class_labels": [i], "num_inference_steps": STEPS, "guidance_scale": 3.0} for i in (1, 2)
]


def _columns(pipe):
    return module_columns(denoisers(pipe)[0])


def _method(folder, pipeline="dit"):
    pipe = tiny(pipeline).pipe
    columns = _columns(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    logits = torch.randn(STEPS, len(columns), generator=torch.Generator().manual_seed(3))
    schedule = routed(logits, columns, 0.5)
    grid = sampling_grid(pipe.scheduler)[1]
    made = to_artifact(schedule, denoisers(pipe)[0], method=RouterCache.name(), grid=grid)
    return RouterCache.load(made.save(folder / "router.safetensors").path)


@pytest.mark.parametrize("check", checks())
def test_conformance(check, tmp_path):
    conform(check, _method(tmp_path), "dit")


# -- against the formulas, module by module ---------------------------------------------------


class _Reference:
    """DiT's blocks written out, with the soft router of the paper in every module."""

    def __init__(self, transformer, scores, threshold):
        self.transformer, self.scores, self.threshold = transformer, scores, threshold
        self.kept = {}
        self.step = 0
        self.hard = False

    def module(self, place, new):
        score = self.scores[self.step][place]
        kept = self.kept.get(place)
        if self.hard:
            out = new if kept is None or score > self.threshold else kept
        else:
            out = new if kept is None else score * new + (1 - score) * kept
        if kept is None or score > self.threshold:
            self.kept[place] = out.detach()
        return out

    def __call__(self, x, t, labels):
        model = self.transformer
        hidden, place = model.pos_embed(x), 0
        for block in model.transformer_blocks:
            normed, gate_a, shift, scale, gate_f = block.norm1(
                hidden, t, labels, hidden_dtype=hidden.dtype
            )
            hidden = hidden + gate_a[:, None] * self.module(place, block.attn1(normed))
            normed = block.norm3(hidden) * (1 + scale[:, None]) + shift[:, None]
            hidden = hidden + gate_f[:, None] * self.module(place + 1, block.ff(normed))
            place += 2
        return hidden


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_modules_follow_the_formulas(hard, tmp_path):
    """(a), (b): blended or switched outputs, and the gradients of the logits."""
    pipe = tiny("dit").pipe
    model, columns = pipe.transformer, _columns(pipe)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(STEPS, len(columns), generator=generator)
    logits[0] = 5.0
    size = model.config.sample_size
    xs = torch.randn(STEPS, 2, model.config.in_channels, size, size, generator=generator)
    labels, threshold = torch.tensor([1, 2]), 0.4
    last = model.transformer_blocks[-1]

    def walk(run):
        rows = [row.clone().requires_grad_() for row in logits]
        outputs = run([row.sigmoid() for row in rows])
        if not hard:
            sum(o.square().mean() for o in outputs).backward()
        return outputs, rows

    def ours(scores):
        found = []
        keep = last.register_forward_hook(lambda m, a, out: found.append(out))
        pipe.scheduler.set_timesteps(STEPS)
        method = _Walk(columns)
        if hard:
            schedule = routed(logits, columns, threshold)
            grid = sampling_grid(pipe.scheduler)[1]
            made = to_artifact(schedule, denoisers(pipe)[0], method=RouterCache.name(), grid=grid)
            method = RouterCache(made.save(tmp_path / "hard.safetensors"))
        with frozen(pipe), attached(method, pipe) as live:
            if not hard:
                assert isinstance(live, LiveWalk)
                live.scores, live.threshold = scores, threshold
            live.clock.begin(pipe.scheduler)
            for i in range(STEPS):
                with live.clock.at(i):
                    model(xs[i], timestep=torch.tensor([9]), class_labels=labels)
            live.clock.end()
        keep.remove()
        return found

    def reference(scores):
        walker = _Reference(model, scores, threshold)
        walker.hard = hard
        found = []
        for walker.step in range(STEPS):
            found.append(walker(xs[walker.step], torch.tensor([9]), labels))
        return found

    got, got_rows = walk(ours)
    want, want_rows = walk(reference)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    if not hard:
        for a, b in zip(got_rows[1:], want_rows[1:], strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_three_iterations_of_training(tmp_path):
    """(c): Adam on lambda_i MSE + beta sum of scores, step by step along the student's path."""
    trainer = RouterTrainer(beta=1e-3, updates=1, lr=0.1, threshold=0.1)
    pipe = tiny("dit").pipe
    start = RouterTraining(trainer, pipe, INPUTS, str(tmp_path), _columns(pipe), "")
    before = start.logits()
    seen = []

    class Watched(RouterTraining):
        def _walk(self, live):
            original = self.optimizer.step

            def step(*a, **k):
                seen.append([None if r.grad is None else r.grad.clone() for r in self.rows])
                return original(*a, **k)

            self.optimizer.step = step
            super()._walk(live)

        def _proxy(self, live):
            return torch.tensor([1.0, 2.0, 3.0, 4.0])

    training = Watched(trainer, pipe, INPUTS, str(tmp_path), _columns(pipe), "")
    training.run()
    after = training.logits()
    assert len(seen) == STEPS - 1
    for i, gradients in enumerate(seen, start=1):
        assert [g is not None for g in gradients] == [j == i for j in range(STEPS)]
        # Adam's first update is lr times the sign of the gradient
        moved = (after[i] - before[i]).sign()
        assert torch.equal(moved, -gradients[i].sign())
        assert torch.allclose((after[i] - before[i]).abs(), torch.tensor(0.1), atol=1e-4)
    assert torch.equal(after[0], torch.full_like(after[0], 5.0))


@pytest.mark.parametrize("proxy", ["leave_one_out", "cumulative"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_proxies_are_changes_of_the_final_sample(proxy, reduce, tmp_path):
    """(d): against full samplings with the rows set by hand."""
    pipe = tiny("dit").pipe
    trainer = RouterTrainer(proxy=proxy, reduce=reduce, updates=1)
    training = RouterTraining(trainer, pipe, INPUTS, str(tmp_path), _columns(pipe), "")
    soft = [row.detach().sigmoid() for row in training.rows]
    one = torch.ones_like(soft[0])

    def final(live, scores):
        live.scores = scores
        training._sample(live, 0)
        return live.last.clone()

    with attached(_Walk(_columns(pipe)), pipe) as live:
        live.threshold, live.guidance = trainer.threshold, 3.0
        found = training._proxy(live)
        for t in range(1, STEPS):
            if proxy == "cumulative":
                before = final(live, [soft[i] if i < t else one for i in range(STEPS)])
                after = final(live, [soft[i] if i <= t else one for i in range(STEPS)])
            else:
                before = final(live, soft)
                after = final(live, [one if i == t else soft[i] for i in range(STEPS)])
            change = (after - before).square()
            want = change.sum() if reduce == "sum" else change.mean()
            assert float(found[t]) == pytest.approx(float(want), rel=1e-4)
            assert want > 0


def test_what_is_kept_is_of_its_solver_stage():
    """As in runs of the schedule: Heun's second stage blends with its own last output."""
    host = tiny("sd")
    columns = _columns(host.pipe)
    with attached([SwapScheduler("HeunDiscreteScheduler"), _Walk(columns)], host.pipe) as live:
        walk = live.members[1]
        walk.scores = [torch.full((len(columns),), 0.5)] * STEPS
        host.run(num_inference_steps=STEPS)
        assert {stage for _, stage, _ in walk.kept} == {0, 1}


def test_thresholding_and_bounds():
    """(e), (f): the first row computes; a logit of -5 never passes the threshold 0.1."""
    logits = torch.tensor([[-5.0, -5.0], [5.0, -5.0], [-2.3, -2.1]])
    assert routed(logits, ("t.a", "t.b"), 0.1) == Schedule(("t.a", "t.b"), ("CC", "CR", "RC"))
    assert 1 / (1 + math.exp(2.3)) < 0.1 < 1 / (1 + math.exp(2.1))


# -- the training ----------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["dit", "sd", "wan", "flux", "sd3"])
def test_training_on_every_kind_of_guidance(pipeline, tmp_path, monkeypatch):
    for module in ("caches._drawn", "caches._resuming"):  # tiny inputs are tensors
        monkeypatch.setattr(f"{module}.inputs_digest", lambda inputs: "tensors")
    host = tiny(pipeline)
    inputs = [{k: v for k, v in host.inputs.items() if k not in ("generator", "output_type")}]
    inputs[0]["num_inference_steps"] = STEPS
    before, state = host.run(), host_state(host.pipe)
    # so high a price that everything is repeated in the end
    trainer = RouterTrainer(beta=1e3, updates=25, lr=0.5, refresh=30)
    artifact = trainer.fit(host.pipe, inputs, str(tmp_path), Recipe(()))
    assert_same_state(state, host_state(host.pipe))
    assert torch.equal(before, host.run())
    schedule = of_artifact(artifact)
    assert schedule.rows[0] == "C" * len(schedule.columns)
    assert set("".join(schedule.rows[1:])) == {"R"}
    # flux's network is told a scale, and no second branch is computed
    assert artifact.guidance is (pipeline != "flux")
    again = Artifact.load(artifact.save(tmp_path / "router.safetensors"))
    assert torch.equal(again.tensors["logits"], artifact.tensors["logits"])


def test_training_on_a_solver_of_two_calls_a_step(tmp_path):
    pipe = tiny("dit").pipe
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    made = RouterTrainer(updates=2, refresh=2).fit(pipe, INPUTS, str(tmp_path))
    assert of_artifact(made).steps == STEPS
    assert torch.isfinite(made.tensors["logits"]).all()


def test_inputs_of_several_batch_sizes_are_each_guided_as_they_are(tmp_path, monkeypatch):
    """What is learned from is what the solver gets, of one sample and of two."""
    apart = []

    def step(self, call_next, model_output, *args, **kwargs):
        def learn(step, student, teacher):
            learned(step, student, teacher)
            if step == 0:  # where nothing is cached
                apart.append(float((teacher - model_output[: len(teacher)]).abs().max()))

        learned, self.on_step = self.on_step, learn if self.on_step else None
        try:
            return original(self, call_next, model_output, *args, **kwargs)
        finally:
            self.on_step = learned

    original = LiveWalk.step
    monkeypatch.setattr(LiveWalk, "step", step)
    inputs = [INPUTS[0], {**INPUTS[0], "class_labels": [1, 2]}]
    RouterTrainer(updates=2, refresh=9).fit(tiny("dit").pipe, inputs, str(tmp_path))
    assert len(apart) == 2
    assert max(apart) < 1e-4


def test_feed_forwards_in_chunks_are_refused(tmp_path):
    pipe = tiny("dit").pipe
    for block in pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(4, 1)
    with pytest.raises(ValueError, match="in chunks"):
        RouterTrainer(updates=1).fit(pipe, INPUTS, str(tmp_path))


def test_inputs_of_several_guidance_scales_are_refused(tmp_path):
    """What the student's outputs are mixed with is one number."""
    mixed = [INPUTS[0], {**INPUTS[0], "guidance_scale": 1.0}]
    with pytest.raises(ValueError, match="guidance_scale"):
        RouterTrainer(updates=1).fit(tiny("dit").pipe, mixed, str(tmp_path))


def test_what_cannot_be_trained_is_refused(tmp_path):
    one_step = [{**INPUTS[0], "num_inference_steps": 1}]
    with pytest.raises(ValueError, match="nothing to repeat"):
        RouterTrainer(updates=1).fit(tiny("dit").pipe, one_step, str(tmp_path))
    two = tiny("wan22")
    with pytest.raises(ValueError, match="one denoiser, not 2"):
        RouterTrainer().calibrate(two.pipe, [two.inputs], str(tmp_path), speed=2.0)


def test_no_price_keeps_modules_that_matter(tmp_path):
    # what no later step reads moves nothing: the last row may stay as it began
    trainer = RouterTrainer(beta=0.0, updates=30, lr=0.5, threshold=0.5, refresh=15)
    artifact = trainer.fit(tiny("dit").pipe, INPUTS, str(tmp_path))
    assert of_artifact(artifact).share() > 0.85


def test_a_training_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    whole = RouterTrainer(beta=1e-4, updates=6, lr=0.1, refresh=2)
    straight = whole.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "whole"))
    monkeypatch.setattr("caches._router_training.CHECKPOINT_SECONDS", 0.0)
    original, count = RouterTraining._walk, []

    def cut(self, live):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(1)
        original(self, live)

    monkeypatch.setattr(RouterTraining, "_walk", cut)
    with pytest.raises(KeyboardInterrupt):
        whole.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    monkeypatch.setattr(RouterTraining, "_walk", original)
    resumed = whole.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    assert torch.allclose(straight.tensors["logits"], resumed.tensors["logits"], atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_checkpoint_that_was_cut_off_is_named(share, tmp_path):
    trainer, pipe = RouterTrainer(updates=1), tiny("dit").pipe
    trainer.fit(pipe, INPUTS, str(tmp_path))
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged; .*remove this$"):
        trainer.fit(pipe, INPUTS, str(tmp_path))


def test_another_training_in_the_same_folder_is_refused(tmp_path):
    RouterTrainer(updates=1).fit(tiny("dit").pipe, INPUTS, str(tmp_path))
    with pytest.raises(ValueError, match="other inputs or settings"):
        RouterTrainer(updates=1, beta=1.0).fit(tiny("dit").pipe, INPUTS, str(tmp_path))
    with pytest.raises(ValueError, match="another model"):
        RouterTrainer(updates=1).fit(tiny("dit", seed=1).pipe, INPUTS, str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": -1.0},
        {"updates": 0},
        {"refresh": 0},
        {"threshold": 1.0},
        {"lr": 0.0},
        {"proxy": "leave-one-out"},
        {"reduce": "max"},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="RouterTrainer"):
        RouterTrainer(**settings)


def test_guidance_is_found_by_what_the_solver_gets():
    plain, toward = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    guided = plain + 4.0 * (toward - plain)
    assert Mix.of([torch.cat([plain, toward])], guided, 4.0) == Mix(2, 0, 1, 4.0)
    assert Mix.of([toward, plain], guided, 4.0) == Mix(2, 1, 0, 4.0)
    assert Mix.of([toward], toward, 4.0) == Mix(2, 0, 0, 4.0)
    twice = torch.cat([guided, guided])
    assert Mix.of([torch.cat([toward, plain])], twice, 4.0) == Mix(2, 1, 0, 4.0)
    with pytest.raises(ValueError, match="another way"):
        Mix.of([plain, toward], torch.randn(2, 3, 4, 4), 4.0)


def test_guidance_is_found_in_half_precision():
    """It loses more than a thousandth; the nearest is taken, as several may be near enough."""
    generator = torch.Generator().manual_seed(0)
    plain, change = torch.randn(2, 2, 3, 4, 4, generator=generator).bfloat16()
    toward = plain + 0.05 * change
    guided = plain + 8.0 * (toward - plain)
    assert Mix.of([toward, plain], guided, 8.0) == Mix(2, 1, 0, 8.0)


def test_true_guidance_is_found_beside_what_the_model_is_told(tmp_path, monkeypatch):
    """HunyuanVideo and Flux have both scales; outputs are mixed with the true one."""
    monkeypatch.setattr("caches._drawn.inputs_digest", str)
    monkeypatch.setattr("caches._resuming.inputs_digest", str)
    host = tiny("hunyuanvideo")
    call = {k: v for k, v in host.inputs.items() if k not in ("generator", "output_type")}
    call |= {"true_cfg_scale": 4.0, "num_inference_steps": 2}
    RouterTrainer(updates=1).fit(host.pipe, [call], str(tmp_path))


def test_calibration_takes_what_is_nearest(tmp_path, monkeypatch):
    """More at a higher price is not certain: each training draws anew."""
    fit, made, found = RouterTrainer.fit, [], iter((30.0, 20.0, 50.0))
    monkeypatch.setattr(RouterTrainer, "fit", lambda *a: made.append(fit(*a)) or made[-1])
    monkeypatch.setattr("caches.router.fidelity", lambda *a: next(found))
    trainer = RouterTrainer(updates=1)
    best = trainer.calibrate(tiny("dit").pipe, INPUTS, str(tmp_path), quality=15.0, tries=3)
    assert best is made[1]


def test_calibration_finds_a_price_for_a_speed_or_a_quality(tmp_path):
    pipe = tiny("dit").pipe
    trainer = RouterTrainer(updates=12, lr=0.8, refresh=20)
    bold = trainer.calibrate(pipe, INPUTS, str(tmp_path / "speed"), speed=1.02, tries=3)
    assert of_artifact(bold).share() < 1.0
    careful = trainer.calibrate(pipe, INPUTS, str(tmp_path / "quality"), quality=5.0, tries=3)
    assert of_artifact(careful).columns == _columns(pipe)
    with pytest.raises(ValueError, match=r"none is so fast .*x at .* dB"):
        trainer.calibrate(pipe, INPUTS, str(tmp_path / "speed"), speed=50.0, tries=1)
    with pytest.raises(ValueError, match="for a speed or for a quality"):
        trainer.calibrate(pipe, INPUTS, str(tmp_path))
