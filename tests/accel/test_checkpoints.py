"""A training goes on from the newest checkpoint that can be read."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from accel import files
from accel.checkpoints import POSITION, checkpoints, newest_checkpoint
from accel.loop import LoopSettings, fit

SETTINGS = LoopSettings(steps=4, checkpoint_steps=2, lr=0.1, warmup=1)


def trained(out, settings=SETTINGS):
    torch.manual_seed(0)

    def loss_of(model, step):
        return model(torch.ones(1, 3) * (step + 1)).square().sum()

    return fit("small", nn.Linear(3, 2), loss_of, settings, out, resume=True)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", POSITION]
)
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_one_is_set_aside_for_the_one_before(tmp_path, capsys, name, gone):
    whole, _ = trained(tmp_path)
    broken = tmp_path / "checkpoint-4" / name
    data = broken.read_bytes()
    broken.unlink()
    if not gone:
        broken.write_bytes(data[: len(data) // 2])
    again, position = trained(tmp_path)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint-4'} is damaged" in said
    assert "resumed at step 2 from checkpoint-2" in said
    assert position.step == 4
    assert all(torch.equal(again[k], whole[k]) for k in whole)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-4.damaged"]


def test_where_none_can_be_read_nothing_is_touched(tmp_path):
    trained(tmp_path)
    for folder in checkpoints(tmp_path):
        (folder / POSITION).write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no checkpoint .*delete the folder"):
        trained(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"]


def test_other_folders_are_none(tmp_path):
    for name in ("checkpoint-4", "checkpoint-20", "checkpoint-30.tmp", "checkpoint-old"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert newest_checkpoint(tmp_path / "checkpoint-4") is None


def test_all_of_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, replace = [], os.replace
    monkeypatch.setattr(files, "_sync", synced.append)

    def renamed(source, target):
        assert {p for p in source.rglob("*") if p.is_file()} <= set(synced)
        synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    trained(tmp_path, LoopSettings(steps=1))
    assert synced == [tmp_path]
