"""A finished file says how to make it again, and the pixels come out the same."""

import json
import shutil

import numpy as np
import pytest

from apps.render.driver import RunOptions, submit
from apps.render.media import decode_png
from apps.render.outputs import read_sidecar
from apps.render.progress import Silent
from apps.render.rerender import again, read_record


@pytest.fixture(scope="module")
def rendered(tmp_path_factory, tiny_model):
    from apps.render.jobs import check_jobs
    from apps.render.plan import Settings, plan

    folder = tmp_path_factory.mktemp("rendered")
    inputs = {"class_labels": [1], "num_inference_steps": 2}
    jobs = check_jobs([("a", {"name": "a", "seed": 4, "inputs": inputs})])
    submit(folder, plan(jobs, Settings(model=tiny_model), folder), RunOptions())
    return folder


def test_from_the_picture_alone(rendered, tmp_path):
    lonely = tmp_path / "anything.png"
    shutil.copy(rendered / "a.png", lonely)
    verdict = again(lonely, tmp_path / "again", Silent(), False)
    assert verdict.same
    assert verdict.changes == []
    assert np.array_equal(decode_png(tmp_path / "again" / "a.png"), decode_png(lonely))
    assert "the same frames" in verdict.lines()[-1]


def test_it_is_rendered_even_where_it_lies_and_never_over_what_is_there(rendered, tmp_path):
    before = {p.name: p.read_bytes() for p in rendered.glob("a.*")}
    with pytest.raises(ValueError, match=r"holds a\.json already"):
        again(rendered / "a.png", rendered, Silent(), False)
    assert {p.name: p.read_bytes() for p in rendered.glob("a.*")} == before
    for name in ("b.json", "a.b.png", "ab.png"):
        (tmp_path / name).touch()
    heard = Heard()
    assert again(rendered / "a.png", tmp_path, heard, False).same
    assert heard.steps == 2
    assert read_sidecar(tmp_path / "a.json")["files"] == read_sidecar(rendered / "a.json")["files"]
    assert sorted(p.name for p in tmp_path.glob("a.*")) == ["a.b.png", "a.json", "a.png"]


class Heard(Silent):
    steps = 0

    def event(self, event, task):
        self.steps += event["event"] == "step"


def test_from_the_sidecar(rendered):
    assert again(rendered / "a.json", None, Silent(), False).same


def test_a_difference_is_told_with_its_reason(rendered, tmp_path):
    shutil.copy(rendered / "a.json", tmp_path / "b.json")
    content = json.loads((tmp_path / "b.json").read_text())
    content["payload"]["job"]["seed"] = 5
    content["versions"]["torch"] = "1.0"
    (tmp_path / "b.json").write_text(json.dumps(content))
    verdict = again(tmp_path / "b.json", None, Silent(), False)
    assert not verdict.same
    assert verdict.changes[0].startswith("torch 1.0 -> ")
    assert "the frames differ" in verdict.lines()[-1]


def test_files_that_say_nothing(rendered, tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="carries no record"):
        read_record(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="no such file"):
        read_record(tmp_path / "none.png")
    content = json.loads((rendered / "a.json").read_text())
    payload = content["payload"]
    for change, place in (
        ({"payload": {}}, "payload.job"),
        ({"payload": payload | {"job": {"sed": 1}}}, "payload.job.sed"),
        ({"payload": payload | {"kind": "anything"}}, "payload.kind"),
        ({"payload": payload | {"model": 3}}, "payload.model"),
        ({"payload": payload | {"recipe": [1]}}, "payload.recipe"),
        ({"payload": payload | {"threads": "many"}}, "payload.threads"),
        ({"payload": payload | {"dtype": "load"}}, "payload.dtype"),
        ({"versions": ["torch"]}, "versions"),
    ):
        (tmp_path / "c.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=f"its record cannot be used: {place}"):
            read_record(tmp_path / "c.json")
    del content["files"][0]["frames_sha256"]
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="carries no record"):
        read_record(tmp_path / "c.json")


def test_a_record_cannot_leave_the_folder(rendered, tmp_path):
    content = json.loads((rendered / "a.json").read_text())
    content["payload"]["stem"] = "../../outside"
    (tmp_path / "d.json").write_text(json.dumps(content))
    verdict = again(tmp_path / "d.json", tmp_path / "safe", Silent(), False)
    assert verdict.same
    assert (tmp_path / "safe" / "rerender.png").exists()
