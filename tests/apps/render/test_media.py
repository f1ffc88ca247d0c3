"""Frames survive PNG bit for bit, and both formats carry their record."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest

from apps.render.media import (
    decode_png,
    embedded_record,
    encode_mp4,
    encode_png,
    frames_sha256,
)

RECORD = {"identity": "ab", "payload": {"job": {"inputs": {"prompt": "ein roter Dreier, 日"}}}}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_exact_and_carries_its_record(tmp_path, channels):
    frames = np.random.default_rng(0).integers(0, 256, (7, 5, channels), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(frames, RECORD))
    assert np.array_equal(decode_png(path), frames)
    assert embedded_record(path) == RECORD
    path.write_bytes(encode_png(frames, None))
    assert embedded_record(path) is None


@pytest.mark.parametrize(("height", "width"), [(32, 48), (17, 31)])
def test_mp4_has_all_frames_and_carries_its_record(tmp_path, height, width):
    av = pytest.importorskip("av")
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    frames = np.stack([np.roll(ramp, f)[None, :, None].repeat(height, 0) for f in range(9)])
    frames = frames.repeat(3, axis=-1)
    data = encode_mp4(frames, 8, RECORD)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert embedded_record(path) == RECORD
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == 8
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 9
    assert shown[0].shape == (height + height % 2, width + width % 2, 3)
    # 4:2:0 at this quality stays within a few grey levels on a smooth ramp; a wrong frame does not.
    error = np.abs(shown[4][:height, 4:-8].astype(int) - frames[4][:, 4 : shown[4].shape[1] - 8])
    assert np.median(error) < 6


def test_a_damaged_file_has_no_record(tmp_path):
    for name in ("a.png", "a.mp4"):
        (tmp_path / name).write_bytes(b"not a picture")
        assert embedded_record(tmp_path / name) is None
        assert embedded_record(tmp_path / f"missing-{name}") is None


@pytest.mark.parametrize("kind", ["bomb", "nested"])
def test_a_hostile_picture_has_no_record(tmp_path, kind):
    side, text = (60_000, b"{}") if kind == "bomb" else (1, b"[" * 100_000)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)),
        (b"iTXt", b"accel\0\0\0\0\0" + text),
        (b"IDAT", zlib.compress(b"\0\0")),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    (tmp_path / "a.png").write_bytes(data)
    assert embedded_record(tmp_path / "a.png") is None


def test_the_hash_sees_shape_type_and_every_byte():
    frames = np.zeros((4, 6, 3), np.uint8)
    seen = {
        frames_sha256(frames),
        frames_sha256(frames.reshape(6, 4, 3)),
        frames_sha256(frames.astype(np.int8)),
        frames_sha256(frames + np.uint8(1)),
    }
    assert len(seen) == 4
    assert frames_sha256(frames) == frames_sha256(np.zeros((6, 4, 3), np.uint8).transpose(1, 0, 2))
    assert frames_sha256(frames) == hashlib.sha256(b"(4, 6, 3)||u1|" + bytes(72)).hexdigest()
