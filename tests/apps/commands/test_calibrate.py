"""`accel calibrate sparse`: a recipe of a quality, checked on an input that was held out."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from accel.method import attached
from accel.recipe_file import read_recipe
from accel.testing import tiny
from apps.cli import app
from sparse_attn.subblock_lse import SubblockLSE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Wan pipeline that reads text, and three jobs."""
    from diffusers import WanPipeline, WanTransformer3DModel

    from accel.zoo.wan import build_scheduler
    from accel.zoo.wan_text import TextConfig, build_tokenizer

    path = tmp_path_factory.mktemp("calibrate")
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=TextConfig.width, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    parts = (build_tokenizer(), TextConfig().build(), tiny("wan").pipe.vae, build_scheduler())
    WanPipeline(*parts, transformer=transformer).save_pretrained(path / "model")
    call = {"height": 16, "width": 32, "num_frames": 9, "num_inference_steps": 3}
    jobs = [
        {"name": f"j{i}", "seed": i, "inputs": {**call, "prompt": said}}
        for i, said in enumerate(("a red three", "a blue one", "a green two"))
    ]
    (path / "jobs.jsonl").write_text("\n".join(json.dumps(job) for job in jobs))
    return path


def calibrate(folder, *more: str):
    command = ["calibrate", "sparse", "--model", str(folder / "model"), "--blocks", "16", "16"]
    command += ["--jobs", str(folder / "jobs.jsonl"), "--dense", "0"]
    return CliRunner().invoke(app, [*command, "--out", str(folder / "sparse.yaml"), *more])


def test_writes_a_recipe_of_a_quality_and_goes_on(folder):
    result = calibrate(folder, "--quality", "45")
    assert result.exit_code == 0, result.output
    said = r"density (\S+), expected PSNR (\S+) dB \((\S+) to (\S+) between inputs\)"
    expected = re.search(said, result.output)
    held_out = re.search(r"held out: density (\S+), PSNR (\S+) dB", result.output)
    assert expected
    assert held_out
    assert float(expected[2]) >= 45
    assert float(expected[3]) < float(expected[2]) < float(expected[4])
    assert float(held_out[2]) == pytest.approx(float(expected[2]), abs=10)
    assert 0 < float(held_out[1]) <= 1
    (method,) = read_recipe(folder / "sparse.yaml").recipe.methods
    assert isinstance(method, SubblockLSE)
    assert method.density == pytest.approx(float(expected[1]), abs=1e-3)
    kept = sorted(p.name for p in (folder / "sparse.parts").iterdir())
    assert len(kept) == 3  # two inputs (the third is held out) and the checks
    again = calibrate(folder, "--density", "0.5")
    assert again.exit_code == 0, again.output
    assert sorted(p.name for p in (folder / "sparse.parts").iterdir()) == kept
    (method,) = read_recipe(folder / "sparse.yaml").recipe.methods
    with attached(method, tiny_pipe(folder)):
        pass  # its artifact is where the recipe says


def tiny_pipe(folder):
    import accel

    return accel.load(str(folder / "model"))


def test_too_few_inputs_are_said(folder):
    result = calibrate(folder, "--count", "9")
    assert result.exit_code == 2
    assert "3 inputs, 9 wanted" in result.output
