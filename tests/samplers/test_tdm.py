"""The formulas of trajectory distribution matching, and a student that learns a ring of Gaussians.

The ring is small enough to see whether the method works: a teacher of 50 steps finds all eight, in
four steps it smears them, and its student of four steps has to be better than that by far.
"""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

import accel
from accel import denoiser
from accel.checkpoints import newest_checkpoint
from accel.loop import LoopSettings
from accel.method import Method, Recipe
from accel.settings import Settings
from accel.testing import tiny
from samplers import tdm
from samplers.distilled import Distilled
from samplers.few_step import FewStepFlowScheduler, FewStepScheduler
from samplers.predictions import Process
from samplers.tdm import (
    HUBER,
    TDM,
    even_anchors,
    fake_loss,
    hop,
    roll_out,
    student_loss,
    student_target,
)
from sparse_attn.kernels import dispatch
from sparse_attn.subblock_lse import SubblockLSE

DIFFUSION = Process.of(FewStepScheduler())
FLOW = Process.of(FewStepFlowScheduler())


def test_anchors_are_those_of_the_papers():
    assert even_anchors(4, 900) == (899, 674, 449, 224)
    assert even_anchors(8) == (999, 874, 749, 624, 499, 374, 249, 124)


@pytest.mark.parametrize("process", [DIFFUSION, FLOW], ids=["diffusion", "flow"])
def test_the_walk_of_a_student_that_knows_the_answer_ends_at_it(process):
    target = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))

    def knows(x, times, index):
        alpha, s = process.levels(times, x)
        noise = (x - alpha * target) / s
        return noise - target if process.prediction == "flow" else noise

    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(2))
    states = roll_out(knows, process, (899, 449, 99), x, 0.5, torch.Generator().manual_seed(0))
    assert len(states) == 3
    for state in states:
        torch.testing.assert_close(state.clean, target, atol=1e-4, rtol=1e-4)
    alpha, s = process.levels(torch.tensor([449.0]), x)
    residue = (states[1].x - alpha * target) / s  # unit noise, of which half was kept
    assert 0.3 < residue.std() < 2


def test_a_hop_that_keeps_all_noise_needs_none():
    clean, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    times = torch.full((4,), 500.0)
    x = hop(FLOW, clean, noise, times, 1.0, torch.Generator())
    torch.testing.assert_close(x, 0.5 * clean + 0.5 * noise)


@pytest.mark.parametrize("prediction", ["flow", "v_prediction"])
def test_the_fake_s_loss_of_velocities_is_their_squared_error(prediction):
    process = FLOW if prediction == "flow" else Process(prediction, 1000, DIFFUSION.alphas)
    g = torch.Generator().manual_seed(0)
    clean, noise, out = torch.randn(3, 5, 2, generator=g)
    times = torch.tensor([100, 300, 500, 700, 900])
    alpha, s = process.levels(times, clean)
    truth = noise - clean if prediction == "flow" else alpha * noise - s * clean
    loss = fake_loss(process, out, alpha * clean + s * noise, clean, times)
    torch.testing.assert_close(loss, (out - truth).square().mean(), atol=1e-4, rtol=1e-4)


def test_the_fake_s_loss_of_noise_counts_as_min_snr():
    g = torch.Generator().manual_seed(0)
    clean, noise, out = torch.randn(3, 2, 4, generator=g)
    for time in (50, 950):  # a ratio of variances above and below the limit
        times = torch.full((2,), time)
        alpha, s = DIFFUSION.levels(times, clean)
        snr = float((alpha / s).flatten()[0] ** 2)
        loss = fake_loss(DIFFUSION, out, alpha * clean + s * noise, clean, times)
        expected = min(snr, 5) / snr * (out - noise).square().mean()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-3)


def test_the_student_s_gradient_is_the_difference_of_the_two_networks():
    g = torch.Generator().manual_seed(0)
    clean, teacher, bare, fake = torch.randn(4, 3, 2, generator=g)
    clean.requires_grad_()
    target, distance = student_target(clean, teacher, bare, fake, 3.0)
    guided = teacher + 2 * (teacher - bare)
    torch.testing.assert_close(target, clean + guided - fake)
    student_loss(clean, target, distance).backward()
    d = fake - guided
    far = (clean.detach() - guided).abs().mean(dim=1, keepdim=True)
    expected = d / (d.square() + HUBER**2).sqrt() / far / clean.numel()
    torch.testing.assert_close(clean.grad, expected)


def test_without_guidance_no_unconditional_call_is_needed():
    a, b, c = torch.randn(3, 2, 2)
    target, _ = student_target(a, b, None, c, 1.0)
    torch.testing.assert_close(target, a + b - c)


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchors": ()},
        {"anchors": (1, 2)},
        {"anchors": (5, 0)},
        {"guidance": 2.0},
        {"updates": 0},
        {"eta": 1.5},
        {"rank": 0},
        {"precision": "bfloat16"},
    ],
)
def test_settings_that_cannot_train_are_refused(wrong):
    with pytest.raises(ValueError, match="TDM"):
        TDM(**{"anchors": (899, 449), **wrong})


# Training on a pipeline

SHORT = {"anchors": (899, 449), "updates": 2, "warmup": 2, "fake_updates": 2}
INPUTS = [{"class_labels": [3, 5], "num_inference_steps": 2}]


def test_a_training_cut_off_ends_as_one_that_was_not(tmp_path, monkeypatch):
    trainer = TDM(**SHORT, guidance=2.0, unconditional=Settings(class_labels=10))
    whole = trainer.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "whole"))

    class Cut(Exception):
        pass

    def cut(*args):
        raise Cut

    with monkeypatch.context() as m:
        m.setattr(tdm, "student_loss", cut)  # in the first cycle after the warm-up
        m.setattr(LoopSettings, "__init__", _saves_every_step(LoopSettings.__init__))
        with pytest.raises(Cut):
            trainer.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    assert newest_checkpoint(tmp_path / "cut").name == "checkpoint-3", "between two cycles"
    again = trainer.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    for name, value in whole.tensors.items():
        assert torch.equal(value, again.tensors[name]), name
    other = TDM(**{**SHORT, "updates": 3}, guidance=2.0, unconditional=Settings(class_labels=10))
    with pytest.raises(ValueError, match="another training"):
        other.fit(tiny("dit").pipe, INPUTS, str(tmp_path / "cut"))
    with pytest.raises(ValueError, match="another training"):
        trainer.fit(tiny("dit", seed=1).pipe, INPUTS, str(tmp_path / "cut"))


def _saves_every_step(stock):
    def init(self, **settings):
        stock(self, **settings, checkpoint_steps=1)

    return init


def test_the_recipe_runs_in_forwards_of_student_and_fake_and_no_others(tmp_path):
    host, calls = tiny("dit"), []

    @dataclass(frozen=True)
    class Listens(Method):
        SLOTS = ("denoiser.call",)

        def claims(self, pipe):
            return frozenset({("denoiser.call", frozenset({"transformer"}))})

        def build(self, pipe, live):
            def layer(call_next, *args, **kwargs):
                live.count("changed")
                calls.append((live.now.branch, live.now.step, round(live.now.sigma, 3)))
                return call_next(*args, **kwargs)

            live.around_denoiser("transformer", layer)

    trainer = TDM(**SHORT, guidance=2.0, unconditional=Settings(class_labels=10))
    trainer.fit(host.pipe, INPUTS, str(tmp_path), Recipe((Listens(),)))
    bar = DIFFUSION.alphas[[899, 449]]
    sigmas = [round(x, 3) for x in ((1 - bar) / bar).sqrt().tolist()]
    assert calls[:2] == [("cond", 0, sigmas[0]), ("cond", 1, sigmas[1])]
    branches = [branch for branch, _, _ in calls]
    updates = SHORT["updates"]
    walks = 2 * (1 + updates)  # two steps; one warm-up
    assert branches.count("cond") == walks + updates
    seen = SHORT["fake_updates"] + 1  # of the warm-up's steps none is the student's
    assert branches.count("fake") == seen * (1 + updates)
    assert len(calls) == branches.count("cond") + branches.count("fake")
    host.run()
    assert len(calls) == len(branches), "the recipe is gone"


class _Attentions:
    """How many self-attentions of each forward of a transformer were sparse."""

    def __init__(self, transformer, monkeypatch):
        self.sparse, self.learned = [], []
        transformer.register_forward_pre_hook(lambda *args: self.sparse.append(0))
        monkeypatch.setattr(dispatch, "attend", functools.partial(self._attend, dispatch.attend))

    def _attend(self, attend, q, *args, **kwargs):
        self.sparse[-1] += 1
        self.learned.append(q.requires_grad)
        return attend(q, *args, **kwargs)


def test_a_student_with_sparse_attention_learns_so_from_a_dense_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(tdm, "inputs_digest", lambda inputs: "")
    host = tiny("wan")
    plain = host.run()
    inside = (host.pipe.scheduler, *(b.attn1.processor for b in host.pipe.transformer.blocks))
    seen = _Attentions(host.pipe.transformer, monkeypatch)
    recipe = Recipe((SubblockLSE(density=0.3, dense=(0.0, 0.0), blocks=(16, 16), guard=False),))
    trainer = TDM((900, 500), updates=1, fake_updates=1, warmup=0, rank=2)
    inputs = [host.inputs | {"guidance_scale": 1.0}]
    artifact = trainer.fit(host.pipe, inputs, str(tmp_path), recipe)
    layers = len(host.pipe.transformer.blocks)
    # the call is looked at; two steps of a walk; a fake's update; a student's: it, fake, teacher
    assert seen.sparse[-6:] == [layers] * 5 + [0]
    assert seen.learned == [False] * 2 * layers + [True] * 2 * layers + [False] * layers
    assert (
        host.pipe.scheduler,
        *(b.attn1.processor for b in host.pipe.transformer.blocks),
    ) == inside
    assert torch.equal(plain, host.run())
    student = Distilled(artifact.save(tmp_path / "student"))
    with accel.attached(Recipe((student, *recipe.methods)), host.pipe) as live:
        host.pipe(**host.inputs | {"guidance_scale": 1.0})
        assert live.report()["runs"][0]["steps"] == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_compiled_blocks_train_the_same_student_and_are_taken_back(tmp_path, monkeypatch):
    """By a compiler that changes nothing: what is left is that every block is traced whole."""
    stock, calls = torch.compile, []

    def traced(call, **settings):
        calls.append(settings)
        return stock(call, backend="eager", fullgraph=True, **settings)

    monkeypatch.setattr(torch, "compile", traced)
    trainer = TDM(**SHORT, rank=2, guidance=2.0, unconditional=Settings(class_labels=10))
    pipe = tiny("dit").pipe
    plain = trainer.fit(pipe, INPUTS, str(tmp_path / "plain"))
    assert not calls
    fast = replace(trainer, compile=True).fit(pipe, INPUTS, str(tmp_path / "fast"))
    assert len(calls) == len(pipe.transformer.transformer_blocks)
    for name, value in plain.tensors.items():
        assert torch.equal(value, fast.tensors[name]), name
    assert not any("_compiled_call_impl" in vars(m) for m in pipe.transformer.modules())


def test_what_cannot_be_trained_is_refused(tmp_path):
    sparse = Recipe((SubblockLSE(density=0.5),))
    with pytest.raises(ValueError, match="no gradients of a recipe's methods"):
        TDM(**SHORT, compile=True).fit(tiny("wan").pipe, INPUTS, str(tmp_path), sparse)
    with pytest.raises(ValueError, match="with eta="):  # as Distilled would say of the student
        TDM(**SHORT).fit(tiny("ddim").pipe, [{"num_inference_steps": 2}], str(tmp_path))
    host = tiny("dit")
    with pytest.raises(ValueError, match="leave guidance_scale out"):
        TDM(**SHORT).fit(host.pipe, [{**INPUTS[0], "guidance_scale": 4.0}], str(tmp_path))
    with pytest.raises(ValueError, match="0 inputs"):
        TDM(**SHORT).fit(host.pipe, [], str(tmp_path))
    with pytest.raises(ValueError, match="anchors"):
        TDM(anchors=(2000, 10)).fit(host.pipe, INPUTS, str(tmp_path))
    host.pipe.to(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        TDM(**SHORT).fit(host.pipe, INPUTS, str(tmp_path))


@pytest.mark.parametrize("name", ["wan", "sd3", "sd", "flux"])
def test_pipelines_of_every_kind_can_be_distilled(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tdm, "inputs_digest", lambda inputs: "")  # of tensors: tiny has no text
    host = tiny(name)
    told = {} if name == "flux" else {"guidance_scale": 1.0}
    artifact = TDM(**SHORT).fit(host.pipe, [host.inputs | told], str(tmp_path))
    module = denoiser.denoisers(host.pipe)[0].module
    moved = [
        n for n, p in module.named_parameters() if not torch.equal(p.half(), artifact.tensors[n])
    ]
    assert len(moved) > len(artifact.tensors) / 2


# The ring


class RingNet(ModelMixin, ConfigMixin):
    """Predicts noise in the plane from (x, y) and the time."""

    @register_to_config
    def __init__(self, width: int = 96):
        super().__init__()
        layers = [nn.Linear(2 + 16, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, hidden_states, timestep):
        waves = torch.exp(torch.arange(8) * (math.log(1000) / 8))
        phase = timestep.float()[:, None] / 1000 * waves
        told = torch.cat([phase.sin(), phase.cos()], dim=1)
        return (self.net(torch.cat([hidden_states, told], dim=1)),)


class RingPipeline:
    """Noise to points, (count, 2)."""

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler

    @torch.no_grad()
    def __call__(self, count, num_inference_steps=50, seed=0):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
        for t in self.scheduler.timesteps:
            out = self.transformer(x, timestep=t.expand(count))[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def ring(count, generator):
    """Points of eight narrow Gaussians on a circle of radius 1.5."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centres = 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres + 0.08 * torch.randn(count, 2, generator=generator)


def sliced_distance(a, b):
    """Mean Wasserstein-1 distance of projections of two sets of points."""
    angle = torch.linspace(0, math.pi, 65)[:-1]
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((a @ axes).sort(dim=0).values - (b @ axes).sort(dim=0).values).abs().mean().item()


@pytest.fixture(scope="module")
def taught():
    denoiser.register("RingNet", denoiser.Anatomy(lambda m: (), lambda m, c, p: (1, 1, 1)))
    torch.manual_seed(0)
    net = RingNet()
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(0)
    total = 2000
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / total)
        x0, noise = ring(512, g), torch.randn(512, 2, generator=g)
        t = torch.randint(1000, (512,), generator=g)
        loss = (net(scheduler.add_noise(x0, noise, t), t)[0] - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return RingPipeline(net, scheduler)


@pytest.mark.parametrize("rank", [None, 16], ids=["full", "low-rank"])
def test_a_student_of_four_steps_finds_the_ring(taught, tmp_path, rank):
    truth = ring(4000, torch.Generator().manual_seed(9))
    before = sliced_distance(taught(4000, 4), truth)
    trainer = TDM(even_anchors(4, 1000), updates=300, lr=4e-4, fake_lr=2e-3, rank=rank)
    artifact = trainer.fit(taught, [{"count": 256}], str(tmp_path / "run"))
    with accel.attached(Distilled(artifact.save(tmp_path / "student")), taught) as live:
        after = sliced_distance(taught(4000, 50), truth)
        assert live.report()["runs"][0]["steps"] == 4
    assert sliced_distance(taught(4000, 4), truth) == before  # the teacher is back
    print(before, after, sliced_distance(taught(4000, 50), truth))
    assert after < 0.6 * before
