"""Two renders side by side: paired, measured, drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from apps import sheet
from apps.pairs import finished, pair
from apps.render.outputs import commit, encode_all


def _write(folder, name, frames, seconds, seed=1):
    folder.mkdir(exist_ok=True)
    payload = {"job": {"name": name, "seed": seed, "inputs": {"class_labels": [3]}}}
    record = {
        "identity": f"{folder.name}-{name}", "stem": name, "payload": payload,
        "timings": {"encode": 0.0, "denoise": seconds, "decode": 0.0},
    }  # fmt: skip
    media = encode_all([frames], stem=name, kind="auto", fps=8, record=record)
    commit(folder, name, media, record)


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for n, name in enumerate(("red-three", "blue-seven", "white-square")):
        frames = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        noise = rng.integers(-9, 10, frames.shape)
        other = np.clip(frames + noise, 0, 255).astype(np.uint8) if n else frames
        _write(tmp_path / "baseline", name, frames, 2.0)
        if n < 2:
            _write(tmp_path / "fast", name, other, 0.5)
    return tmp_path / "baseline", tmp_path / "fast"


def test_pairs(folders):
    blue, red = pair(finished(folders[0]), finished(folders[1]))
    assert (red.baseline.label, red.psnr, red.speed_up) == ("red three", None, 4.0)
    # Uniform noise of -9..9 has a mean square of 30: 10 log10(255^2 / 30) = 33.4 dB.
    assert blue.psnr == pytest.approx(33.4, abs=0.5)
    assert 0.8 < blue.ssim < 1
    assert sheet.mean_psnr([red, blue]) == f"{blue.psnr:.1f} dB (1 identical)"
    assert sheet.mean_psnr([red]) == "identical"


@pytest.mark.parametrize("missing", ["payload", "timings", "stem"])
def test_a_sidecar_that_says_too_little_is_no_render(folders, missing):
    path = folders[1] / "red-three.json"
    content = json.loads(path.read_text())
    del content[missing]
    path.write_text(json.dumps(content))
    assert [rendered.label for rendered in finished(folders[1])] == ["blue seven"]


def test_the_sheet_shows_the_pixels(folders, tmp_path):
    out = tmp_path / "deep" / "sheet.png"
    assert sheet.write_sheet(folders, out, title="Title") == 3
    with Image.open(out) as opened:
        drawn = np.asarray(opened.convert("RGB"))
    for folder, rows in ((folders[0], 1), (folders[1], 2)):
        tile = np.asarray(Image.open(folder / "red-three.png")).repeat(4, 0).repeat(4, 1)
        assert _count(drawn, tile) == 2, f"row {rows}: the enlarged picture is not on the sheet"
    assert tuple(drawn[0, 0]) == sheet.PAPER


def _count(drawn, tile):
    """How often `tile` is found in `drawn`, looking only where its first row starts."""
    height, width = tile.shape[:2]
    first = tile[0].tobytes()
    found = 0
    for y in range(drawn.shape[0] - height + 1):
        row = drawn[y].tobytes()
        x = row.find(first)
        while x >= 0:
            column = x // 3
            found += x % 3 == 0 and np.array_equal(
                drawn[y : y + height, column : column + width], tile
            )
            x = row.find(first, x + 1)
    return found


def test_many_jobs_are_broken_into_bands(tmp_path):
    for n in range(sheet.MAX_COLUMNS + 1):
        _write(tmp_path / "a", f"job{n}", np.full((16, 16, 3), 10 * n, np.uint8), 1.0, seed=n)
    jobs, rows = sheet.build_rows([tmp_path / "a"], {})
    wide = sheet.compose(jobs, rows, "x")
    narrow = sheet.compose(jobs[:3], [sheet.Row("a", [], rows[0].cells[:3])], "x")
    assert wide.height > 1.5 * narrow.height
    assert wide.width == narrow.width + 9 * (sheet.TILE + sheet.GAP)


def test_nothing_in_common(tmp_path, folders):
    _write(tmp_path / "other", "green-zero", np.zeros((32, 32, 3), np.uint8), 1.0)
    with pytest.raises(ValueError, match="no job in common"):
        sheet.write_sheet([folders[0], tmp_path / "other"], tmp_path / "sheet.png")


def test_an_evaluation_s_own_tasks_are_no_jobs(folders):
    """`accel sheet` takes the renders below a report, too."""
    record = {"identity": "0", "stem": "look", "payload": {"what": "look"}, "figures": {}}
    commit(folders[0], "look", [], record)
    assert len(finished(folders[0])) == 3


def test_what_is_said_of_speed(folders):
    _, rows = sheet.build_rows(folders, {})
    assert rows[1].facts[0] == "500 ms each (median), 4.00x"
    _, rows = sheet.build_rows(folders, {"fast": "3.9x as fast"})
    assert rows[1].facts[0] == "3.9x as fast"


def test_times_for_people():
    assert sheet.shown(0.0854) == "85 ms"
    assert sheet.shown(1.254) == "1.25 s"


def test_a_video_is_compared_over_all_its_frames(tmp_path):
    import numpy as np

    from apps.pairs import Rendered, middle, pair
    from apps.render.outputs import commit, encode_all

    pytest.importorskip("av")
    rendered = []
    frames = np.full((1, 5, 32, 32, 3), 100, np.uint8)
    for name, last in (("a", 100), ("b", 220)):
        frames[0, 4] = last  # only the last frame differs: the middle one says nothing
        media = encode_all(list(frames.copy()), stem=name, kind="auto", fps=8, record=None)
        job = {"inputs": {"prompt": "x"}, "seed": 0}
        record = {"identity": name, "stem": name, "payload": {"job": job}, "timings": {}}
        rendered.append(Rendered(tmp_path, commit(tmp_path, name, media, record)))
    one = pair(rendered[:1], rendered[1:])[0]
    assert rendered[0].is_video
    assert one.psnr < 15
    assert middle(rendered[0].frames()).shape == (32, 32, 3)
