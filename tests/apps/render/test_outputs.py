"""Media first, sidecar last: a sidecar never vouches for what is not there."""

import json
import os

import numpy as np
import pytest

from apps.render import outputs
from apps.render.media import decode_png, embedded_record, frames_sha256

RECORD = {"identity": "a" * 64, "stem": "a", "payload": {}, "timings": {"total": 1.5}}


def _frames(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(count)]


def _commit(folder, frames, record=RECORD):
    media = outputs.encode_all(frames, stem="a", kind="auto", fps=8, record=record)
    return outputs.commit(folder, "a", media, record)


def test_one_sample(tmp_path):
    (frames,) = _frames(1)
    content = _commit(tmp_path, [frames])
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.png"]
    assert np.array_equal(decode_png(tmp_path / "a.png"), frames)
    assert embedded_record(tmp_path / "a.png")["frames_sha256"] == frames_sha256(frames)
    assert outputs.read_sidecar(tmp_path / "a.json") == content
    assert outputs.is_complete(tmp_path, content, thorough=True)
    assert outputs.result_of(content)["files"] == ["a.png"]


def test_several_samples_then_fewer(tmp_path):
    _commit(tmp_path, _frames(3))
    assert sorted(os.listdir(tmp_path)) == ["a.000.png", "a.001.png", "a.002.png", "a.json"]
    content = _commit(tmp_path, _frames(2, seed=1))
    assert sorted(os.listdir(tmp_path)) == ["a.000.png", "a.001.png", "a.json"]
    assert outputs.is_complete(tmp_path, content, thorough=True)


def test_a_crash_between_media_and_sidecar_is_no_commit(tmp_path, monkeypatch):
    _commit(tmp_path, _frames(1))
    real, written = outputs.write_atomically, []

    def crash_at_sidecar(path, data):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(outputs, "write_atomically", crash_at_sidecar)
    with pytest.raises(KeyboardInterrupt):
        _commit(tmp_path, _frames(1, seed=1))
    assert written == ["a.png"]
    assert outputs.read_sidecar(tmp_path / "a.json") is None, "the old one vouched for new media"


def test_damage_is_noticed(tmp_path):
    content = _commit(tmp_path, _frames(1))
    picture = tmp_path / "a.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-1])
    assert not outputs.is_complete(tmp_path, content)
    picture.write_bytes(whole[:-1] + b"x")
    assert outputs.is_complete(tmp_path, content)
    assert not outputs.is_complete(tmp_path, content, thorough=True)
    picture.unlink()
    assert not outputs.is_complete(tmp_path, content)


@pytest.mark.parametrize("stem", ["wait ... what", "a.b", "v1.5 b"])
@pytest.mark.parametrize("count", [1, 2])
def test_names_with_dots_are_believed(tmp_path, stem, count):
    media = outputs.encode_all(_frames(count), stem=stem, kind="auto", fps=8, record=None)
    content = outputs.commit(tmp_path, stem, media, RECORD)
    assert outputs.read_sidecar(tmp_path / f"{stem}.json") == content


def test_a_sidecar_nested_without_end_is_none(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" * 100_000)
    assert outputs.read_sidecar(tmp_path / "a.json") is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"identity": 3},
        {"files": {}},
        {"files": [{"name": "../../etc/passwd"}]},
        {"files": [{"name": "/etc/passwd.png"}]},
        {"files": [{"name": ".bashrc.png"}]},
        {"files": [{"name": "con..png", "bytes": 7, "sha256": "0", "frames_sha256": "0"}]},
        {"files": ["a.png"]},
        {"files": [{"name": "a.png"}]},
        {"files": [{"name": "a.png", "bytes": "7", "sha256": "0", "frames_sha256": "0"}]},
    ],
)
def test_foreign_sidecars_are_not_believed(tmp_path, change):
    content = _commit(tmp_path, _frames(1)) | change
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert outputs.read_sidecar(tmp_path / "a.json") is None


def test_shapes_and_formats():
    video = np.zeros((3, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="makes videos"):
        outputs.encode_all([video], stem="a", kind="png", fps=8, record=None)
    with pytest.raises(ValueError, match="neither a picture nor a video"):
        outputs.encode_all([np.zeros((4, 4), np.uint8)], stem="a", kind="auto", fps=8, record=None)
    pytest.importorskip("av")
    (medium,) = outputs.encode_all([video], stem="a", kind="auto", fps=8, record=None)
    assert medium.name == "a.mp4"
    assert medium.shape == (3, 4, 4, 3)
