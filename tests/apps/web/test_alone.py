"""Apps of their own: killed and started again, behind a password, with videos, seen by axe."""

import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from apps.render.ledger import Ledger
from benchmarks.bench_page import SETTLES, TABS, audit

pytestmark = pytest.mark.slow
AXE = os.environ.get("AXE_CORE", "")  # axe.min.js of npm's axe-core


@pytest.fixture
def serving(tmp_path, serve):
    """`serving(*options)`: an app that ends with the test; `again()` starts one in its folder."""
    running = []

    def start(*options):
        running.append(serve(tmp_path / "out", *options))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.end()


def test_killing_the_server_loses_nothing(serving, tab, digits, wait_until):
    first = serving()
    one = tab(first.address)
    one.start_batch(digits(8, steps=100), "killed")
    one.page.get_by_text(re.compile(r"[2-5] of 8 done")).wait_for(timeout=240_000)
    worker = _child(first.process.pid)
    first.kill()
    wait_until(lambda: not Path(f"/proc/{worker}").exists() or _is_zombie(worker))
    folder = first.out / "batches" / "killed"
    with Ledger.look(folder / "ledger.sqlite") as ledger:
        made = {t.id: t.result for t in ledger.tasks("done")}
    assert 2 <= len(made) < 8
    again = serving()
    two = tab(again.address)
    two.go("Batch")
    assert two.state("#batch-status", "paused") == "paused", "nobody renders it now"
    two.page.get_by_role("button", name="Resume").click()
    two.state("#batch-status", "finished")
    with Ledger.look(folder / "ledger.sqlite") as ledger:
        after = {t.id: t.result for t in ledger.tasks("done")}
    assert len(after) == 8
    assert made.items() <= after.items(), "what was done is done once"


def test_a_page_that_is_open_outlives_its_app(serving, tab):
    first = serving()
    one = tab(first.address)
    page = one.page
    page.get_by_label("Steps").fill("5")
    page.locator("#generate").click()
    one.state("#trial", "done")
    one.go("Search")
    page.evaluate("window.before = true")
    first.kill()
    page.get_by_text("The app does not answer").wait_for()
    serving("--port", urllib.parse.urlsplit(first.address).port)
    page.wait_for_function("!window.before", timeout=60_000)
    page.get_by_role("tab", name="Search", selected=True).wait_for()
    page.get_by_text("No search yet").wait_for()
    one.go("Create")
    page.get_by_text("Your last result is not shown any more").wait_for()
    one.ready()
    page.get_by_label("Steps").first.fill("5")
    page.locator("#generate").click()
    assert one.state("#trial", "done", "failed") == "done", "the new app knows the page's fields"


def _child(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(p) for p in children.read_text().split()] if children.exists() else []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(p) for p in path.read_text().split()]
    return max(set(found))


def _is_zombie(pid):
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_a_password_is_asked_for_beyond_this_machine(serving):
    app = serving("--listen", "0.0.0.0")
    said = app.log.read_text()
    user, password = re.search(r"user: (\S+)   password: (\S+)", said).groups()
    (app.out / "a.png").touch()
    for path in ("/config", f"/gradio_api/file={app.out}/a.png", "/gradio_api/info"):
        assert app.get(path)[0] == 401, path
    host = app.address.replace("0.0.0.0", "127.0.0.1").rstrip("/")
    jar = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    assert _login(jar, host, user, "wrong") == 400
    assert _login(jar, host, user, password) == 200
    with jar.open(f"{host}/config") as answer:
        assert json.load(answer)["title"] == "accel"


def _login(jar, host, user, password):
    body = urllib.parse.urlencode({"username": user, "password": password}).encode()
    try:
        with jar.open(f"{host}/login", body) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_videos_play_in_step(serving, tab):
    pytest.importorskip("av")
    app = serving()
    one = tab(app.address)
    page = one.page
    page.locator("#model input").click()
    page.get_by_role("option", name="zoo:digits-wan").click()
    page.get_by_label("Prompt").wait_for()
    page.get_by_label("Prompt").fill("a red three moving left on a dark background")
    page.get_by_label("Steps").fill("4")
    page.get_by_text("More settings").click()
    for name, value in (("Width", 64), ("Height", 64), ("Frames", 9)):
        page.get_by_label(name, exact=True).fill(str(value))
    page.get_by_text("Methods of my choice").click()
    page.get_by_label("IntervalCache", exact=True).check()
    page.get_by_text("This fits the model.").wait_for()
    page.locator("#generate").click()
    assert one.state("#trial", "done", "failed") == "done"
    players = page.locator("#trial [data-players]")
    players.get_by_role("button", name="Play").click()
    players.get_by_role("button", name="Pause").wait_for()
    page.wait_for_timeout(1500)
    players.get_by_role("button", name="Pause").click()
    times = players.locator("video").evaluate_all("all => all.map(v => v.currentTime)")
    assert len(times) == 2
    assert abs(times[0] - times[1]) < 0.15, "out of step"
    sizes = players.locator("video").evaluate_all("all => all.map(v => v.videoWidth)")
    assert sizes == [64, 64], "a video did not arrive"
    seek = players.locator("[data-seek]")
    seek.fill("500")
    page.wait_for_timeout(300)
    times = players.locator("video").evaluate_all("all => all.map(v => v.currentTime / v.duration)")
    assert times == pytest.approx([0.5, 0.5], abs=0.05)
    one.go("Compare")
    page.locator("#comparison [data-players]").wait_for()


@pytest.mark.skipif(not Path(AXE).is_file(), reason="set AXE_CORE to axe.min.js of npm's axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(app, tab, digits, scheme):
    one = tab(app.address, color_scheme=scheme)
    page = one.page
    page.get_by_label("Steps").fill("10")
    page.locator("#generate").click()
    one.state("#trial", "done")
    one.start_batch(digits(2, steps=5))
    one.state("#batch-status", "finished")
    page.evaluate(Path(AXE).read_text())
    found = {}
    for name in TABS:
        one.go(name)
        page.wait_for_timeout(SETTLES)
        for rule, violation in audit(page)["violations"].items():
            if rule not in KNOWN:
                found[f"{name}: {rule}"] = violation
    assert found == {}, json.dumps(found, indent=1)


# What axe finds in Gradio itself, which a page on it cannot change.
KNOWN = {"label-content-name-mismatch"}  # the button inside gr.File
