"""README's figures and the method index come from results, and are up to date."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from accel import zoo
from accel.methods import INDEX_FILE
from benchmarks import results_file, tables
from benchmarks.bench_leap import SHARES, STEPS
from benchmarks.sampler_tables import SHOWN
from caches.native import TaylorSeer


def test_everything_generated_is_up_to_date():
    for path, content in tables.outputs().items():
        assert path.read_text("utf-8") == content, f"{path}: run python -m benchmarks.tables"


def test_a_figure_typed_by_hand_is_overwritten():
    text = "a\n<!-- generated: kills -->\n999 of 999\n<!-- end -->\nb\n"
    made = tables.render_page(text)
    assert "999" not in made
    assert made.startswith("a\n<!-- generated: kills -->\n")
    assert made.endswith("\n<!-- end -->\nb\n")
    with pytest.raises(KeyError):
        tables.render_page("<!-- generated: nothing -->\n<!-- end -->")


KILLS = "<!-- generated: kills -->"
END = "<!-- end -->"


@pytest.mark.parametrize(
    ("marks", "why"),
    [
        ([KILLS, "figures"], "line 2: block 'kills' has no end mark"),
        ([KILLS, "figures", "a person wrote this", KILLS, END], "line 2: block 'kills' has no end"),
        ([KILLS, END, "words", END], "line 5: an end mark without a block"),
        ([f"{KILLS} ", END], "line 2: .* is no mark of a block"),
        ([KILLS, "<!--end-->", "words", KILLS, END], "line 3: .* is no mark of a block"),
        (["<!-- generated: one two -->", END], "line 2: .* is no mark of a block"),
    ],
)
def test_marks_that_do_not_pair_up_are_refused(marks, why):
    with pytest.raises(ValueError, match=why):
        tables.render_page("\n".join(["# Page", *marks, ""]))


def test_a_page_with_such_marks_is_named(copy_of_root):
    (copy_of_root / "README.md").write_text(f"{KILLS}\n")
    with pytest.raises(ValueError, match=r"README\.md: line 1"):
        tables.outputs()


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tables", *arguments])
    return tables.main()


@pytest.fixture
def copy_of_root(tmp_path, monkeypatch):
    for package in tables.OWN:
        (tmp_path / package).mkdir()
        shutil.copy(tables.ROOT / package / INDEX_FILE, tmp_path / package)
    for folder in ("benchmarks", "recipes"):
        (tmp_path / folder).mkdir()
    for page in tables.PAGES:
        shutil.copy(tables.ROOT / page, tmp_path / page)
    for name in zoo.names():
        card = Path("accel") / "zoo" / name / "README.md"
        (tmp_path / card).parent.mkdir(parents=True)
        shutil.copy(tables.ROOT / card, tmp_path / card)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "block"),
    [
        ("README.md", "methods"),
        ("README.md", "kills"),
        ("benchmarks/README.md", "beside"),
        ("benchmarks/README.md", "overhead"),
        ("accel/zoo/digits-dit/README.md", None),
    ],
)
def test_one_digit_changed_in_a_page_is_found(copy_of_root, monkeypatch, page, block, capsys):
    assert _run(monkeypatch, "--check") == 0
    readme = copy_of_root / page
    good = readme.read_text("utf-8")
    mark = "## What accelerating it costs" if block is None else f"<!-- generated: {block} -->"
    begin = good.index(mark)
    place = re.compile(r"\d").search(good, begin)
    assert place is not None
    digit = str((int(place[0]) + 1) % 10)
    readme.write_text(good[: place.start()] + digit + good[place.end() :], "utf-8")
    assert _run(monkeypatch, "--check") == 1
    assert page in capsys.readouterr().out
    assert _run(monkeypatch) == 0
    assert readme.read_text("utf-8") == good


def test_one_digit_changed_in_an_index_is_found(copy_of_root, monkeypatch):
    index = copy_of_root / "caches" / INDEX_FILE
    index.write_text(re.sub(r"\d", lambda m: str(9 - int(m[0])), index.read_text(), count=1))
    assert _run(monkeypatch, "--check") == 1


def test_a_picture_of_other_results_is_found(tmp_path, monkeypatch):
    source = tmp_path / "waterfall.json"
    source.write_text("{}")
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "PICTURE", dict.fromkeys(results_file.DEVICES, tmp_path / "w.png"))
    assert tables.stale_pictures() == [tmp_path / "w.png"], "there is none"


def test_the_shipped_picture_is_of_the_shipped_results():
    assert tables.stale_pictures() == []


def test_rows_that_do_not_compare_are_not_put_into_one_study():
    row = {"study": "s", "model": "m", "hardware": "h", "threads": 1, "protocol": "p"}
    other = {**row, "study": "t", "threads": 2}
    assert tables.conditions([row, row, other]) == [
        "s on m, h, 1 thread(s)",
        "t on m, h, 2 thread(s)",
    ]
    for key, value in (("hardware", "g"), ("threads", 2), ("protocol", None), ("model", "n")):
        with pytest.raises(ValueError, match="one protocol"):
            tables.conditions([row, {**row, key: value}])


def test_results_of_earlier_weights_are_said_to_be(monkeypatch):
    row = {"study": "s", "model": "m", "hardware": "h", "threads": 1, "protocol": "p"}
    now = tables.weights_sha256(tables.zoo.path("digits-ddpm"))
    models = [({"weights_sha256": now}, False), ({"weights_sha256": "0"}, True), ({}, False)]
    for weights, said in models:
        result = {"protocol": {"model": {"name": "zoo:digits-ddpm", **weights}}}
        there = {"cpu": result, "cuda": None}
        monkeypatch.setattr(tables, "read", lambda _, device="cpu", there=there: there[device])
        text = tables._every_device("s", lambda _: "a table")
        assert ("zoo:digits-ddpm was trained further" in text) == said
        assert ("earlier weights" in tables.conditions([row])[0]) == said


def test_a_method_without_a_measured_row_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    assert tables.index_rows("caches") == []
    both = {**ROW, "methods": [TaylorSeer().to_json()] * 2}
    rows = {"both": both, "control: x": ROW, "peer": {**ROW, "methods": [PEER]}}
    (tmp_path / "native.json").write_text(json.dumps({**STUDY, "rows": rows}))
    assert tables.index_rows("caches") == [], "combinations and controls are not rows of a method"
    (tmp_path / "native.json").write_text(json.dumps({**STUDY, "rows": {**rows, "alone": ROW}}))
    (row,) = tables.index_rows("caches")
    assert row["name"] == "caches.native:TaylorSeer"
    assert row["measured"]["setting"] == "alone"
    assert row["measured"]["judged"] == ROW["judged"]
    assert row["fields"] == ["interval", "warmup", "max_order", "modules"]


def test_the_table_beside_shows_what_the_first_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    rows = {"alone": ROW, "control: x": ROW, "peer": {**ROW, "methods": [PEER]}}
    (tmp_path / "native.json").write_text(json.dumps({**STUDY, "rows": rows}))
    made = tables.BLOCKS["beside"]()
    assert "| control: x |" in made
    assert "| peer |" in made
    assert "| alone |" not in made
    assert "200.0 % (+190.0 to +210.0) | 1.50 |" in made  # what the example row says
    assert "unmodified 200.0 %" in tables.BLOCKS["methods"]()


ENVIRONMENT = {
    "hardware": "a processor",
    "threads": 1,
    "versions": {"torch": "2"},
    "commit": None,
    "date": "2026-01-31",
    "load": None,
}
INTERVAL = {"estimate": 2.0, "low": 1.9, "high": 2.1}
PEER = {"method": "benchmarks.peers:CacheDit", "settings": {}}
ROW = {
    "speedup": INTERVAL,
    "flops": [4, 2],
    "nfe": [8, 8],
    "peak_bytes": None,
    "psnr": INTERVAL,
    "ssim": None,
    "judged": {
        "referee": "r",
        "accuracy": {"before": INTERVAL, "after": INTERVAL, "difference": INTERVAL},
        "feature_distance": None,
        "frechet": {"before": 1.0, "after": 1.5, "floor": 0.5},
    },
    "methods": [TaylorSeer().to_json()],
    "effect": ["some"],
    "seconds": None,
    "per_sample": None,
    "protocol": None,
    "environment": ENVIRONMENT,
}
STUDY = {
    "environment": ENVIRONMENT,
    "protocol": None,
    "model": "m",
    "steps": 50,
    "guidance": 3.0,
    "batch": 2,
    "samples": 4,
}


def test_what_readme_leaves_out_is_no_better_than_what_is_simpler():
    rows = tables.read("caches_20")["rows"]
    at = "first 25% of the steps"
    ours = rows[f"token density, drawn: {at}"]["psnr"]
    control = rows[f"control: tokens drawn anywhere, {at}"]["psnr"]
    assert ours["low"] < control["high"]
    leaps = tables.read("leap")["rows"]
    shares = {round(share * STEPS): f"Leap({share:.2f})" for share in SHARES}
    for count, leap in shares.items():
        assert leaps[leap]["psnr"]["high"] < leaps[f"control: {count} steps"]["psnr"]["low"]
    indexed = [*tables.index_rows("caches"), *tables.index_rows("samplers")]
    assert set(tables.BELOW) <= {row["name"] for row in indexed}
    for study, mine, simpler in tables.BELOW.values():
        rows = tables.read(study)["rows"]
        if study == "time_shift":  # by distance, of several sets
            shown = [r for r in rows if (r["sampler"], r["steps"]) == SHOWN]
            shifts = {r["setting"]: r["frechet"] for r in shown}
            assert min(shifts[mine]) > max(shifts[simpler])
            continue
        one, other = rows[mine], rows[simpler]
        for figure in ("speedup", "psnr"):
            assert one[figure]["low"] < other[figure]["high"]
    page = (tables.ROOT / "README.md").read_text("utf-8")
    assert not any(f"| `{name}`" in page for name in tables.BELOW)
    assert all(f"`{name}`" in page for name in tables.BELOW)
