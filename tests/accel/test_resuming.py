"""A folder goes on with the work it holds, and with no other."""

from __future__ import annotations

import pytest

from accel.resuming import require_same_work


def test_the_same_work_goes_on(tmp_path):
    for _ in range(2):
        require_same_work(tmp_path / "new/mark.json", {"bits": 8, "model": "a"}, "training")
    require_same_work(tmp_path / "new/mark.json", {"model": "a", "bits": 8}, "training")


def test_other_work_is_refused_by_what_differs_and_stays(tmp_path):
    mark, before = tmp_path / "mark.json", {"bits": 8, "model": "a" * 99, "seed": 0}
    require_same_work(mark, before, "calibration")
    with pytest.raises(ValueError, match="another calibration") as refused:
        require_same_work(mark, {"bits": 4, "model": "b" * 99, "seed": 0}, "calibration")
    said = str(refused.value)
    assert "bits 8 there, 4 here" in said
    assert "of another model" in said
    assert str(tmp_path) in said
    assert "seed" not in said
    require_same_work(mark, before, "calibration")


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"{}"])
def test_a_damaged_mark_is_said(tmp_path, damage):
    mark = tmp_path / "mark.json"
    mark.write_bytes(damage)
    with pytest.raises(ValueError, match="damaged"):
        require_same_work(mark, {"bits": 8}, "training")
    assert mark.read_bytes() == damage


def test_checkpoints_of_nobody_knows_what_are_not_gone_on_with(tmp_path):
    mark = tmp_path / "mark.json"
    require_same_work(mark, {"bits": 8}, "training")
    (tmp_path / "checkpoint-3").mkdir()
    require_same_work(mark, {"bits": 8}, "training")
    mark.unlink()
    with pytest.raises(ValueError, match=r"no mark\.json that says of which training; delete"):
        require_same_work(mark, {"bits": 8}, "training")
    assert not mark.exists()


def test_a_mark_survives_a_full_disk(tmp_path, full_disk):
    mark = tmp_path / "run" / "mark.json"
    for _ in range(2):
        with full_disk(), pytest.raises(OSError, match="File too large"):
            require_same_work(mark, {"seed": 12345678}, "training")
        require_same_work(mark, {"seed": 12345678}, "training")
    with pytest.raises(ValueError, match="seed 12345678 there, 1 here"):
        require_same_work(mark, {"seed": 1}, "training")
    assert [path.name for path in mark.parent.iterdir()] == ["mark.json"]
