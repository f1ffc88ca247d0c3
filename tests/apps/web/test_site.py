"""Names from a browser are looked up, never believed."""

import pytest

from apps.web.batches import MAX_BYTES, MAX_JOBS, read_jobs
from apps.web.checks import sentence
from apps.web.server import Serving, credentials, serve
from apps.web.site import Refused, Site


@pytest.fixture
def site(tmp_path, tiny_model):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "fast.yaml").write_text("accel_recipe: 1\nmethods: []\n")
    (tmp_path / "out" / "batches" / "one").mkdir(parents=True)
    (tmp_path / "out" / "batches" / "one" / "a.json").write_text("{}")
    return Site(tmp_path / "out", (tiny_model,), (tmp_path / "recipes",))


@pytest.mark.parametrize("name", ["zoo:other", "/etc", "../..", "", None, 3, ["x"]])
def test_what_is_not_there_is_refused(site, name):
    for look in (site.model, site.recipe, site.render):
        with pytest.raises(Refused) as refused:
            look(name)
        assert str(refused.value).endswith(".")


def test_what_is_there_is_found(site, tiny_model):
    assert site.model(tiny_model) == tiny_model
    assert site.recipe("fast").name == "fast.yaml"
    assert list(site.renders()) == ["batches/one"]


def test_serves_only_media_below_the_output_folder(site, tmp_path):
    inside = site.out / "batches" / "one"
    for name in ("a.png", "b.mp4", "ledger.sqlite", ".hidden.png"):
        (inside / name).touch()
    (inside / "away.png").symlink_to("/etc/hostname")
    (tmp_path / "beside.png").touch()
    served = {p.name for p in inside.iterdir() if site.serves(str(p))}
    assert served == {"a.png", "b.mp4"}
    assert not site.serves(str(tmp_path / "beside.png"))
    assert not site.serves(f"{inside}/../../../beside.png")


def test_the_limits_of_an_upload(site, tiny_model):
    with pytest.raises(Refused, match="larger than"):
        read_jobs(b" " * (MAX_BYTES + 1), site, tiny_model)
    line = b'{"seed": %d, "inputs": {"class_labels": [1]}}\n'
    many = b"".join(line % i for i in range(MAX_JOBS + 1))
    with pytest.raises(Refused, match="at most"):
        read_jobs(many, site, tiny_model)
    jobs = read_jobs(b'{"recipe": "fast", "inputs": {"class_labels": [1]}}', site, tiny_model)
    assert jobs[0].job.recipe == str(site.recipe("fast"))


def test_an_error_becomes_a_sentence():
    clash = "a.b:One and c.d:Two both claim 'scheduler' at 'x'; leave one of them out"
    assert sentence(clash) == (
        "Two and One cannot go together: both choose the solver (x). Leave one of them out."
    )
    assert sentence("no such\n  file") == "No such file."


def test_nobody_outside_gets_in_without_a_password(site, tmp_path):
    for serving in (Serving(listen="0.0.0.0"), Serving(share=True)):
        with pytest.raises(ValueError, match="password"):
            serve(site, serving)
    user, password = credentials(None)
    assert user
    assert len(password) >= 12
    assert credentials(None)[1] != password
    file = tmp_path / "auth"
    file.write_text("me:long enough\n")
    assert credentials(file) == ("me", "long enough")
    file.write_text("me:short")
    with pytest.raises(ValueError, match="user:password"):
        credentials(file)
