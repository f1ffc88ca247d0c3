"""A decode call survives the disk; a damaged file counts as none."""

import pytest
import torch

from apps.render.latents import CannotKeep, Latents, read, write


def test_round_trip_of_a_whole_call(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    base = torch.arange(24.0).reshape(2, 3, 4)
    args = (base.transpose(0, 1), torch.tensor([0.05], dtype=torch.bfloat16), None, [1, 2.5, "x"])
    kwargs = {"return_dict": False, "generator": generator, "half": base[0].half()}
    write(tmp_path / "x", Latents("decode", args, kwargs, {"notes": ["n"]}))
    again = read(tmp_path / "x")
    assert again is not None
    assert again.mode == "decode"
    assert again.story == {"notes": ["n"]}
    assert torch.equal(again.args[0], args[0])
    assert again.args[1].dtype is torch.bfloat16
    assert again.args[2:] == (None, [1, 2.5, "x"])
    assert again.kwargs["return_dict"] is False
    expected = torch.randn(4, generator=generator)
    assert torch.equal(torch.randn(4, generator=again.kwargs["generator"]), expected)


def test_damage_and_absence(tmp_path):
    path = tmp_path / "x"
    assert read(path) is None
    write(path, Latents("frames", (torch.zeros(1, 2, 2, 3),), {}))
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-5], b"\xff" * 64, whole[:8] + b"{" * 50):
        path.write_bytes(damaged)
        assert read(path) is None


def test_what_cannot_be_kept_is_said(tmp_path):
    with pytest.raises(CannotKeep, match="object"):
        write(tmp_path / "x", Latents("decode", (object(),), {}))


def test_finite():
    good = Latents("decode", (torch.zeros(2),), {"steps": torch.tensor([1])})
    assert good.is_finite()
    assert not Latents("decode", (torch.tensor([1.0, float("nan")]),), {}).is_finite()
