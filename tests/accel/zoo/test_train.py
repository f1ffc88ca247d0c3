import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiTPipeline
from torch import nn

from accel import loop, zoo
from accel.checkpoints import POSITION, Position, newest_checkpoint
from accel.loop import Ema, LoopSettings
from accel.zoo import train
from accel.zoo.dit import DiTConfig, NoiseLoss
from accel.zoo.judge import Judge
from accel.zoo.training import ema_weights
from accel.zoo.world import NULL_CLASS

ROOT = Path(__file__).parents[3]
STEPS = 24


def arguments(out: Path, *more: str) -> list[str]:
    return ["digits-judge", "--preset", "smoke", "--steps", str(STEPS), "--out", str(out), *more]


@pytest.fixture
def one_thread():
    """Here and in the child, because the thread count changes the last bits of a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_training_resumes_and_ends_where_an_uninterrupted_one_does(tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "accel.zoo.train", *arguments(killed)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while newest_checkpoint(killed / "judge") is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    found = newest_checkpoint(killed / "judge")
    at = Position.read(found / POSITION).step
    assert 0 < at < STEPS
    then = ema_weights(found)

    train.main(arguments(killed, "--resume"))
    assert f"resumed at step {at}" in capsys.readouterr().out
    train.main(arguments(whole))
    ends = [newest_checkpoint(out / "judge") for out in (killed, whole)]
    positions = [Position.read(end / POSITION) for end in ends]
    assert [p.step for p in positions] == [STEPS, STEPS]
    assert positions[0].curve == positions[1].curve
    a, b = (ema_weights(end) for end in ends)
    assert all(torch.equal(a[name], b[name]) for name in b)
    # Control: the comparison can fail; the weights did move after the kill.
    assert not all(torch.equal(then[name], b[name]) for name in b)


def test_warm_restart_goes_on_from_the_shipped_weights_and_position(tmp_path):
    record = json.loads((zoo.path("digits-judge") / "training.json").read_text())
    began = record["stages"]["judge"]["step"]
    train.main([*arguments(tmp_path, "--start", "shipped"), "--steps", "1"])
    end = newest_checkpoint(tmp_path / "judge")
    assert Position.read(end / POSITION).step == began + 1
    shipped = Judge.load(zoo.path("digits-judge")).state_dict()
    for name, weight in ema_weights(end).items():
        assert torch.allclose(weight, shipped[name], atol=1e-4)


def test_training_goes_on_from_any_shipped_folder_even_between_stages(tmp_path):
    """An unfinished model is kept, and its missing stages are trained later, elsewhere."""
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(["digits-dit", "--preset", "smoke", "--steps", "2", "--out", str(first)])
    record = json.loads((first / "shipped" / "training.json").read_text())
    del record["stages"]["denoiser"]  # as if the first run had ended before it
    (first / "shipped" / "training.json").write_text(json.dumps(record))
    start = ("--start", str(first / "shipped"))
    preset = ("--preset", "smoke", "--steps", "3")
    train.main(["digits-dit", *preset, "--out", str(second), *start])
    after = json.loads((second / "shipped" / "training.json").read_text())["stages"]
    assert after["autoencoder"]["step"] == 2  # kept
    assert after["denoiser"]["step"] == 3  # from its beginning
    kept, made = (
        AutoencoderKL.from_pretrained(out / "shipped" / "vae", dtype=torch.float32).state_dict()
        for out in (first, second)
    )
    assert all(torch.equal(made[name], weight) for name, weight in kept.items())


def test_a_folder_without_a_training_is_no_start(tmp_path):
    with pytest.raises(SystemExit, match=r"no training.json there"):
        train.main(arguments(tmp_path / "out", "--start", str(tmp_path)))


def test_a_second_training_does_not_overwrite_the_first(tmp_path):
    (tmp_path / "judge" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds a training already"):
        train.main(arguments(tmp_path))


def test_resuming_with_another_seed_is_refused(tmp_path):
    train.main(arguments(tmp_path, "--steps", "2"))
    with pytest.raises(SystemExit, match="was begun with seed 0, not 1"):
        train.main(arguments(tmp_path, "--resume", "--seed", "1"))


def test_resuming_with_another_batch_or_preset_is_refused(tmp_path, monkeypatch):
    known = train.model("digits-judge")
    made = SimpleNamespace(stages=known.stages, presets=known.presets, train=lambda run: None)
    monkeypatch.setattr(train, "model", lambda name: made)
    monkeypatch.setattr(train, "ship", lambda *place: None)
    train.main(arguments(tmp_path, "--batch", "8"))
    train.main(arguments(tmp_path, "--resume", "--batch", "4"))  # nothing was drawn yet
    newest = tmp_path / "judge" / "checkpoint-2"
    newest.mkdir(parents=True)
    Position(step=2).write(newest / POSITION)
    with pytest.raises(SystemExit, match="was begun with batch of judge 4, not 8"):
        train.main(arguments(tmp_path, "--resume", "--batch", "8"))
    with pytest.raises(SystemExit, match="was begun with preset smoke, not cpu"):
        train.main(arguments(tmp_path, "--resume", "--batch", "4", "--preset", "cpu"))
    train.main(arguments(tmp_path, "--resume", "--batch", "4"))
    train.main([*arguments(tmp_path, "--resume", "--batch", "8"), "--steps", "2"])  # it is done


def test_digits_dit_is_trained_shipped_and_loaded_from_nothing(tmp_path):
    """The whole way in miniature; the picture is noise, the folder is stock."""
    train.main(["digits-dit", "--preset", "smoke", "--steps", "2", "--out", str(tmp_path)])
    pipe = DiTPipeline.from_pretrained(tmp_path / "shipped")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[3], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    # Half precision rounds by at most 2^-11, relative; below 2^-14 by 2^-25, absolute.
    trained = ema_weights(newest_checkpoint(tmp_path / "denoiser"))
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.allclose(weight, trained[name], rtol=2**-11, atol=2**-25)
    record = json.loads((tmp_path / "shipped" / "training.json").read_text())
    assert {s: v["step"] for s, v in record["stages"].items()} == {"autoencoder": 2, "denoiser": 2}


def test_gpu_preset_without_a_gpu_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(ValueError, match="needs a CUDA device; use --preset cpu"):
        train.main(["digits-judge", "--preset", "gpu", "--out", str(tmp_path)])


@pytest.mark.parametrize("wrong", [{}, {"steps": 0}, {"minutes": -1}])
def test_settings_that_cannot_train_are_refused(wrong):
    with pytest.raises(ValueError, match="LoopSettings"):
        LoopSettings(**wrong)


def test_learning_rate_warms_up_and_falls():
    settings = LoopSettings(steps=100, lr=1.0, warmup=10)
    rates = [loop.learning_rate(settings, Position(step=i)) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.05)
    assert rates[-1] < 0.03
    late = Position(step=1050, origin_step=1000)  # after a warm restart
    assert loop.learning_rate(settings, late) == pytest.approx(rates[50])


def test_loss_that_is_not_finite_stops_training(tmp_path):
    settings = LoopSettings(steps=5, log_steps=1)
    model = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="broken: loss nan at step 1"):
        loop.fit(
            "broken",
            model,
            lambda m, step: m(torch.ones(1)).sum() * float("nan"),
            settings,
            tmp_path,
        )


def test_what_is_not_finite_is_never_saved(tmp_path):
    settings = LoopSettings(steps=20, checkpoint_steps=2, log_steps=50)

    def loss_of(model, step):
        return model(torch.ones(1, 1)).sum() * (torch.nan if step == 6 else 1)

    with pytest.raises(FloatingPointError, match="broken: loss nan at step 8"):
        loop.fit("broken", nn.Linear(1, 1), loss_of, settings, tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_each_training_has_its_own_precision_and_leaves_accelerate_as_it_was(tmp_path):
    found = []

    def loss_of(model, step):
        found.append(torch.is_autocast_enabled("cpu"))
        return model(torch.ones(1, 1)).sum()

    theirs = Accelerator(cpu=True, gradient_accumulation_steps=3)
    before = dict(vars(theirs.state))
    for precision in ("bf16", "no"):
        settings, out = LoopSettings(steps=1), tmp_path / precision
        loop.fit("own", nn.Linear(1, 1), loss_of, settings, out, precision=precision)
    assert found == [True, False]
    assert vars(theirs.state) == before
    assert theirs.gradient_accumulation_steps == 3


def test_average_lags_behind_the_weights():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Ema(model, decay=0.9, updates=10_000)
    nn.init.ones_(model.weight)
    average.update(model)
    assert average.weights["weight"].item() == pytest.approx(0.1)


def pool(count: int):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(count, 4, 8, 8, generator=generator)
    return means, torch.full_like(means, 0.1), torch.arange(count) % 100


class Recorder(nn.Module):
    """Stands for the transformer; keeps what it was called with."""

    def forward(self, x, timestep, class_labels):
        self.x, self.t, self.y = x, timestep, class_labels
        return type("Output", (), {"sample": torch.zeros_like(x)})


def test_noise_loss_is_a_function_of_the_step():
    recorder = Recorder()
    losses = [NoiseLoss(pool(64), 16, 0, "cpu")(recorder, step) for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_noise_loss_sees_every_picture_once_a_pass_in_a_new_order():
    loss = NoiseLoss(pool(64), 16, 0, "cpu")
    first, second = (torch.cat([loss.rows(4 * e + i) for i in range(4)]) for e in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(64))
    assert torch.equal(second.sort().values, torch.arange(64))
    assert not torch.equal(first, second)


def test_noise_loss_drops_one_class_in_ten_and_covers_the_schedule():
    loss, recorder = NoiseLoss(pool(2000), 2000, 0, "cpu"), Recorder()
    loss(recorder, 0)
    dropped = (recorder.y == NULL_CLASS).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=5 * (0.09 / 2000) ** 0.5)
    assert torch.bincount(recorder.t, minlength=1000).max() <= 3
    assert recorder.t.min() == 0
    assert recorder.t.max() == 999
    # Unit variance in, unit variance out: the schedule preserves it, at both ends.
    for part in (recorder.x[:200], recorder.x[-200:]):
        assert part.var().item() == pytest.approx(1.0, abs=0.05)


def test_fresh_transformer_predicts_zero():
    model = DiTConfig(layers=1).build()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = model(x, timestep=torch.tensor([3, 700]), class_labels=torch.tensor([0, NULL_CLASS]))
    assert out.sample.abs().max() == 0


def test_a_training_ends_with_the_stage_it_was_told_to(tmp_path):
    out = tmp_path / "dit"
    train.main(["digits-dit", "--preset", "smoke", "--out", str(out), "--until", "autoencoder"])
    assert newest_checkpoint(out / "autoencoder") is not None
    assert not (out / "denoiser").exists()
    with pytest.raises(SystemExit, match="names one of"):
        train.main(["digits-dit", "--out", str(tmp_path / "other"), "--until", "nothing"])


class TwoLayers(nn.Module):
    """One matrix for Muon, and a layer for AdamW."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(4, 8, bias=False)
        self.out = nn.Linear(8, 1)

    def matrices(self):
        return [self.matrix.weight]

    def forward(self, x):
        return self.out(torch.tanh(self.matrix(x)))


def two_layers_loss(model, step):
    x = torch.randn(16, 4, generator=loop.step_generator(0, step))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def test_muon_moves_a_matrix_alike_in_all_directions_and_the_rest_as_adamw(tmp_path):
    moved = {}
    for muon in (True, False):
        torch.manual_seed(0)
        model = TwoLayers()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        settings = LoopSettings(steps=1, lr=1e-2, warmup=1, muon=muon)
        loop.fit("two", model, two_layers_loss, settings, tmp_path / str(muon))
        moved[muon] = {k: v - before[k] for k, v in model.state_dict().items()}
    ratio = {}
    for muon, moves in moved.items():
        values = torch.linalg.svdvals(moves["matrix.weight"])
        ratio[muon] = (values[-1] / values[0]).item()
    assert ratio[True] > 0.5 > ratio[False]
    assert torch.equal(moved[True]["out.weight"], moved[False]["out.weight"])


@pytest.mark.usefixtures("one_thread")
def test_training_with_muon_resumes_to_the_bit(tmp_path):
    def trained(folder, steps, **options):
        torch.manual_seed(0)
        settings = LoopSettings(steps=8, lr=1e-2, warmup=2, muon=True, checkpoint_steps=4)
        model = TwoLayers()
        calls = []

        def loss(model, step):
            if len(calls) == steps:
                raise KeyboardInterrupt
            calls.append(step)
            return two_layers_loss(model, step)

        return loop.fit("two", model, loss, settings, folder, **options)[0]

    whole = trained(tmp_path / "whole", 8)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", 6)
    resumed = trained(tmp_path / "killed", 8, resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_the_settings_of_a_training_survive_a_full_disk(tmp_path, full_disk, monkeypatch):
    known = train.model("digits-judge")
    seen = []
    made = SimpleNamespace(stages=known.stages, presets=known.presets, train=seen.append)
    monkeypatch.setattr(train, "model", lambda name: made)
    monkeypatch.setattr(train, "ship", lambda *place: None)
    train.main(arguments(tmp_path))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        train.main(arguments(tmp_path, "--resume"))
    train.main(arguments(tmp_path, "--resume"))
    assert len(seen) == 2
    with pytest.raises(SystemExit, match="begun with seed 0"):
        train.main(arguments(tmp_path, "--resume", "--seed", "1"))
