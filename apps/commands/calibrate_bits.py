"""`calibrate bits`: which layers in 4 bits, which in 8, which as they are, within a budget."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.calibration import model_and_inputs
from apps.commands.device import Device, Dtype, NumberType
from apps.commands.say import told

if TYPE_CHECKING:
    import torch

    from accel.method import Recipe

SEED = 1000  # of trials' noise; layers are measured with that of seeds from 0 on


def bits(
    model: Annotated[str, typer.Option(help="Model: zoo:NAME, a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Plan to write, YAML that can be edited.")],
    size: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Bytes that the layers may take, as a share of whole ones."
        ),
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Time that the layers may take on this machine, as a share."
        ),
    ] = None,
    psnr: Annotated[
        float | None,
        typer.Option(help="Least PSNR in dB, measured; the plan is as small as it allows."),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(help="Job file whose inputs are used; zoo models have their own."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pipeline calls to measure on.")] = 1,
    calls: Annotated[
        int, typer.Option(min=1, help="Denoiser calls that are kept of each pipeline call.")
    ] = 5,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe that the quantised model will be used with.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    dtype: NumberType = Dtype.float32,
    device: Device = "auto",
) -> None:
    """A plan of bits by layer, within one budget: --size, --time or --psnr.

    Each layer is put into 8 and into 4 bits alone, and the denoiser's output looked at. A stopped
    measurement goes on where it was; another budget needs none. `calibrate tfmq --plan` follows it.
    """
    with told():
        budgets = {"size": size, "time": time, "psnr": psnr}
        given = {k: v for k, v in budgets.items() if v is not None}
        if len(given) != 1:
            raise ValueError(f"give one budget: --size, --time or --psnr; got {sorted(given)}")
        import torch

        import accel
        from accel.method import Recipe
        from quant.calibrate import TFMQCalibration
        from quant.mixed_precision import for_quality, measured, total, within, write_plan

        torch.set_num_threads(threads)
        pipe, inputs, _ = model_and_inputs(model, jobs, (device, dtype), count)
        others = accel.read_recipe(recipe).recipe if recipe is not None else Recipe(())
        how, kept = TFMQCalibration(rounding="nearest", calls=calls), out.with_suffix(".parts")
        layers = measured(pipe, inputs, how, str(kept), others, say=typer.echo)
        if psnr is None:
            saves, share = ("bytes", size) if size is not None else ("seconds", time)
            plan = within(layers, saves, share)  # type: ignore[arg-type]
        else:
            trial = Trial(pipe, inputs, others)
            plan, found = for_quality(layers, trial.psnr, psnr)
            typer.echo(f"{found:.1f} dB on these inputs, weights rounded to the nearest")
        whole = dict.fromkeys(plan, 16)
        shares = {
            k: round(total(layers, plan, k) / total(layers, whole, k), 3)
            for k in ("bytes", "seconds")
        }
        about = {"model": model, "budget": given, "of_whole_layers": shares}
        write_plan(out, layers, plan, about)
        of = f"{shares['bytes']:.0%} of whole layers' bytes, {shares['seconds']:.0%} of their time"
        typer.echo(f"wrote {out}: {of}")
        typer.echo(f"next: accel calibrate tfmq --model {model} --plan {out} --out RECIPE.yaml")


class Trial:
    """Whole runs under a plan, against the same without it."""

    def __init__(self, pipe: Any, inputs: list[dict[str, Any]], others: Recipe) -> None:
        self.pipe, self.inputs, self.others = pipe, inputs, others
        self.wanted = self._samples(others)

    def psnr(self, plan: dict[str, int]) -> float:
        """Mean over samples in dB, on other noise than the layers were measured with."""
        from accel.measure import mean_psnr
        from accel.method import Recipe
        from accel.settings import Settings
        from quant.calibrate import TFMQCalibration
        from quant.tfmq import TFMQ

        how = TFMQCalibration(rounding="nearest", plan=Settings(plan))
        with tempfile.TemporaryDirectory() as folder:
            artifact = how.fit(self.pipe, self.inputs, folder, self.others, say=lambda _: None)
            ref = artifact.save(Path(folder) / "trial.safetensors")
            found = mean_psnr(self._samples(Recipe((TFMQ(ref), *self.others.methods))), self.wanted)
        typer.echo(f"{sum(b < 16 for b in plan.values())} layers in few bits: {found:.1f} dB")
        return found

    def _samples(self, recipe: Recipe) -> torch.Tensor:
        import torch

        from accel.measure import pipeline_samples
        from accel.method import attached

        changes = recipe.call_changes()
        with attached(recipe, self.pipe):
            seeded = enumerate(self.inputs, start=SEED)
            return torch.cat([pipeline_samples(self.pipe, {**x, **changes}, s) for s, x in seeded])
