"""The app in a real browser: the main path of every tab, and what must not work."""

import json
import re
from urllib.parse import quote, urlparse

import pytest

from apps.render.ledger import Ledger
from apps.web.site import REPORTS

SLOW_STEPS = 900  # of digits-dit: about ten seconds, so that there is time to cancel


def figure(page, name):
    """The value of one of the big figures under a trial."""
    return page.locator(".ac-figures div", has_text=name).locator("dd").inner_text()


def test_create_shows_both_with_what_each_cost(app, tab):
    one = tab(app.address)
    page = one.page
    assert page.get_by_text("Nothing rendered yet").is_visible(), "an empty page says what to do"
    assert page.locator("#class input").input_value() == "red three"
    page.locator("#generate").click()
    assert one.state("#trial", "done", "failed") == "done"
    shown = page.locator("#trial")
    for title in ("Baseline", "Accelerated", "Difference"):
        assert shown.locator("figcaption", has_text=title).count() == 1
    for image in shown.locator("img").all():
        assert image.evaluate("i => i.complete && i.naturalWidth > 0"), "a picture did not arrive"
        assert image.get_attribute("alt"), "a picture without a text"
    times = shown.locator(".ac-facts div", has_text="Network evaluations").locator("dd")
    baseline, accelerated = (int(t) for t in times.all_inner_texts())
    assert baseline == 100, "50 steps with guidance"
    assert accelerated < baseline
    assert figure(page, "Network that ran") == f"{accelerated}%", "counted at the modules, the same"
    assert re.fullmatch(r"\d+\.\d\d x|\d+\.\d\dx", figure(page, "Speed"))
    assert re.fullmatch(r"\d+\.\d dB", figure(page, "PSNR"))
    assert "% of the network ran in 50 of 50 steps" in shown.locator(".ac-heat").inner_text()
    assert {urlparse(url).netloc for url in one.hosts if url.startswith("http")} == {
        urlparse(app.address).netloc
    }, "the page asked another host"
    assert one.errors == []
    page.reload()
    assert one.state("#trial", "done") == "done", "a page that is reloaded finds its result"


def test_methods_that_cannot_go_together_are_explained_as_they_are_ticked(app, tab):
    page = tab(app.address).page
    page.get_by_text("Methods of my choice").click()
    page.get_by_label("FirstBlockCache", exact=True).check()
    page.get_by_text("This fits the model.").wait_for()
    page.get_by_label("TaylorSeer", exact=True).check()
    page.get_by_text("FirstBlockCache and TaylorSeer cannot go together").wait_for()
    page.locator("#generate").click()
    page.locator(".ac-error").nth(1).wait_for()
    assert page.locator("#trial [data-state]").count() == 0, "nothing was started"


def test_settings_of_a_method_are_edited_and_a_wrong_one_is_a_sentence(app, tab):
    one = tab(app.address)
    page = one.page
    page.get_by_text("Methods of my choice").click()
    page.get_by_label("FirstBlockCache", exact=True).check()
    page.get_by_text("This fits the model.").wait_for()
    page.get_by_text("Settings of FirstBlockCache", exact=True).click()
    threshold = page.locator("#settings").get_by_label("threshold").locator("visible=true")
    assert threshold.input_value() == "0.08", "the form begins with the method's own settings"
    page.get_by_label("Steps", exact=True).fill("10")
    threshold.fill("-1")
    page.get_by_text("FirstBlockCache: threshold cannot be -1; it must be").first.wait_for()
    page.locator("#generate").click()
    page.locator(".ac-error").nth(1).wait_for()
    assert page.locator("#trial [data-state]").count() == 0, "nothing was started"
    share = page.locator("#trial .ac-figures div", has_text="Network that ran").locator("dd")
    for value, ran in (("0.0001", r"100%"), ("10", r"[1-4]?\d%")):  # never reused, reused always
        threshold.fill(value)
        page.locator("#generate").click()
        share.get_by_text(re.compile(f"^{ran}$")).wait_for()
        assert one.state("#trial", "done", "failed") == "done"
    assert one.errors == []


def test_conflicts_follow_the_settings(app, tab):
    """IntervalCache skips blocks as TaylorSeer does: they clash whatever is set."""
    page = tab(app.address).page
    page.get_by_text("Methods of my choice").click()
    for name in ("FirstBlockCache", "TaylorSeer"):
        page.get_by_label(name, exact=True).check()
    page.get_by_text("FirstBlockCache and TaylorSeer cannot go together").wait_for()
    page.get_by_text("Settings of TaylorSeer", exact=True).click()
    page.locator("#settings").get_by_label("interval").locator("visible=true").fill("2.5")
    page.get_by_text("TaylorSeer: interval cannot be 2.5; it must be a valid integer").wait_for()
    page.get_by_label("TaylorSeer", exact=True).uncheck()
    page.get_by_text("This fits the model.").wait_for()
    page.get_by_text("Settings of TaylorSeer", exact=True).wait_for(state="hidden")


def test_cancel_works_at_once_and_a_slow_step_does_not_hold_it_up(app, tab):
    one = tab(app.address)
    page = one.page
    page.get_by_label("Steps").fill(str(SLOW_STEPS))
    page.locator("#generate").click()
    page.locator("#trial .ac-heat").wait_for()
    page.locator("#cancel").click()
    one.state("#trial", "cancelled")
    page.get_by_label("Steps").fill("5")
    page.locator("#generate").click()
    assert one.state("#trial", "done", "failed") == "done", "the device is free again"


def test_a_batch_survives_its_page(app, tab, digits):
    one = tab(app.address)
    one.start_batch(digits(6, steps=100), "reload")
    one.page.get_by_text(re.compile(r"[1-5] of 6 done")).wait_for()
    one.page.close()
    again = tab(app.address)
    again.go("Batch")
    assert again.state("#batch-status", "finished") == "finished"
    page = again.page
    page.locator(".ac-gallery li").nth(5).wait_for()
    assert page.locator(".ac-gallery img").count() == 6
    with Ledger.look(app.out / "batches" / "reload" / "ledger.sqlite") as ledger:
        assert ledger.counts()["done"] == 6
        assert {task.attempts for task in ledger.tasks()} == {1}


def test_pause_resume_and_cancel(app, tab, digits):
    one = tab(app.address)
    page = one.page
    one.start_batch(digits(24, steps=200), "pause")  # enough of them to be paused on a busy machine
    page.get_by_text(re.compile(r"[1-9]\d* of 24 done")).wait_for()
    page.get_by_role("button", name="Pause").click()
    one.state("#batch-status", "paused")
    with Ledger.look(app.out / "batches" / "pause" / "ledger.sqlite") as ledger:
        counts = ledger.counts()
    assert (counts["running"], counts["failed"]) == (0, 0)
    assert 0 < counts["pending"] < 24
    page.get_by_role("button", name="Resume").click()
    one.state("#batch-status", "rendering")
    page.get_by_role("button", name="Cancel", exact=True).last.click()
    one.state("#batch-status", "ended")
    assert "Cancelled" in page.locator("#batch-status").inner_text()


HOSTILE = {
    "pickle": (
        b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
        "not valid UTF-8",
    ),
    "model": (b'{"model": "/etc"}', "is not one of this app"),
    "hub": (b'{"model": "runwayml/stable-diffusion-v1-5"}', "is not one of this app"),
    "recipe": (b'{"recipe": "../../../../etc/passwd"}', "There is no recipe called"),
    "name": (b'{"name": "../../escape"}', "contains a path separator"),
    "code": (b'{"inputs": {"callback_on_step_end": "os.system"}}', "cannot be given here"),
    "argument": (b'{"inputs": {"cross_attention_kwargs": 1}}', "takes no argument"),
    "steps": (b'{"inputs": {"class_labels": [1], "num_inference_steps": 99999999}}', "at most"),
    "deep": (b'{"inputs": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}", "nested deeper"),
    "verifier": (b'{"search": {"verifier": "clip:/etc"}}', "is not allowed here"),
    "command": (b'{"search": {"verifier": "worker:touch /tmp/x"}}', "is not allowed here"),
    "markup": (b'{"<img src=x onerror=document.title=1>": 1}', "unknown field"),
}


def test_a_hostile_upload_is_refused_in_a_sentence(app, tab, tmp_path):
    one = tab(app.address)
    page = one.page
    one.go("Batch")
    before = sorted((app.out / "batches").glob("*")) if (app.out / "batches").is_dir() else []
    for name, (raw, message) in HOSTILE.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes(raw)
        page.locator("input[type=file]").set_input_files(str(file))
        page.locator(".file-preview").wait_for()
        page.locator("#start-batch").click()
        page.locator(".ac-error", has_text=message).wait_for()
        page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()
    assert page.title() == "accel", "markup of a job became part of the page"
    assert one.errors == []
    after = sorted((app.out / "batches").glob("*")) if (app.out / "batches").is_dir() else []
    assert after == before, "nothing was started"


def test_only_media_of_the_output_folder_are_served(app, tiny_model):
    (app.out / "secret.txt").write_text("secret")
    (app.out / "link.png").unlink(missing_ok=True)
    (app.out / "link.png").symlink_to("/etc/hostname")
    wrong = [
        "/etc/passwd", f"{app.out}/secret.txt", f"{app.out}/../../../../../etc/passwd",
        f"{app.out}/link.png", f"{tiny_model}/model_index.json", "https://example.com/x.png",
        "relative.png", f"{app.out}/%2e%2e/%2e%2e/etc/passwd",
    ]  # fmt: skip
    for path in wrong:
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            for written in (path, quote(path, safe="")):
                status, body = app.get(route + written)
                assert status in (403, 404), (route, written, status)
                assert b"secret" not in body
                assert b"root:" not in body
    assert app.get("/gradio_api/proxy=https://example.com")[0] == 403


def test_another_host_name_is_refused(app):
    """A page elsewhere whose name was made to point here (DNS rebinding) gets nothing."""
    assert app.get("/config", Host="evil.example")[0] == 421
    assert app.get("/config")[0] == 200


def test_recipes_say_what_was_measured(app, tab):
    one = tab(app.address)
    page = one.page
    one.go("Recipes")
    page.get_by_label("digits-dit-evolution").check()
    page.locator("h2", has_text="digits-dit-evolution").wait_for()
    words = page.locator(".ac-recipe", has_text="EvolutionCache").inner_text()
    for expected in ("EvolutionCache", "Speed-up", "PSNR to baseline", "of the cells computed"):
        assert expected in words
    with page.expect_download() as download:
        page.get_by_text("Download with its artifacts").click()
    import zipfile

    names = zipfile.ZipFile(download.value.path()).namelist()
    assert "digits-dit-evolution.yaml" in names
    assert [name for name in names if name.startswith("artifacts/")]


def test_compare_moves_its_divider_by_keys(app, tab):
    one = tab(app.address)
    page = one.page
    page.get_by_label("Steps").fill("10")
    page.locator("#generate").click()
    one.state("#trial", "done")
    one.go("Compare")
    slider = page.locator("#comparison [data-slider]")
    slider.wait_for()
    slider.locator("input").focus()
    page.keyboard.press("ArrowRight")
    assert slider.evaluate("s => s.style.getPropertyValue('--cut')") == "51%"
    page.get_by_label("Side by side").check()
    page.locator("#comparison figcaption", has_text="Baseline").wait_for()


def test_the_whole_path_works_with_keys_alone(app, tab):
    one = tab(app.address)
    page = one.page
    page.locator("#model input").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    assert page.evaluate("document.activeElement.id") == "generate"
    page.keyboard.press("Enter")
    one.state("#trial", "running", "done")
    one.state("#trial", "done")


def open_search(one):
    """The Search tab, once its form knows the model: one that is given a text, if there is one."""
    one.go("Search")
    one.page.wait_for_function("document.querySelector('#search-prompt textarea')?.value")
    one.page.locator("#about-search", has_text="keep the best").wait_for()


def test_every_algorithm_has_its_settings_and_says_where_it_cannot_search(app, tab):
    one = tab(app.address)
    page = one.page
    open_search(one)
    about = page.locator("#about-search")
    assert page.get_by_text("cannot search this").count() == 0, "all can search this model"
    page.get_by_label("Good is").click()
    page.get_by_role("option", name="sharpness", exact=True).click()
    page.get_by_text("1 other cannot search this").click()
    about.get_by_text("has no gradient to climb").wait_for()
    page.locator("#algorithm input").click()
    assert page.get_by_role("option").count() == 9
    page.get_by_role("option", name="Gradient search, not here").wait_for()
    page.get_by_role("option", name="Rollover budget forcing", exact=True).click()
    about.get_by_text("Take the first next state that promises more").wait_for()
    page.get_by_text("Settings of Rollover budget forcing").click()
    settings = page.locator("#search-settings")
    page.get_by_role("spinbutton", name="Steps").last.fill("6")
    settings.get_by_label("starts").locator("visible=true").fill("0")
    about.get_by_text("Rollover: starts cannot be 0; it must be at least 1").wait_for()
    page.locator("#start-search").click()
    page.locator(".ac-error").nth(1).wait_for()
    assert page.locator("#search [data-state]").count() == 0, "nothing was started"
    settings.get_by_label("starts").locator("visible=true").fill("2")
    settings.get_by_label("quota").locator("visible=true").fill("1")
    about.locator(".ac-error").wait_for(state="detached")
    page.locator("#start-search").click()
    assert one.state("#search", "done", "failed") == "done"
    page.get_by_text("8 candidates: 1 render, 7 previews").wait_for()  # 2 starts, 5 steps
    assert one.errors == []


def test_candidates_appear_with_their_scores_and_one_is_picked(app, tab):
    one = tab(app.address)
    page = one.page
    open_search(one)
    page.get_by_role("spinbutton", name="Steps").last.fill("6")
    page.get_by_role("spinbutton", name="Budget, in renders").fill("6")
    page.locator("#start-search").click()
    assert one.state("#search", "done", "failed") == "done"
    cells = page.locator("#candidates .ac-gallery li")
    assert cells.count() == 6
    scores = [float(words.split(": ")[1]) for words in cells.all_inner_texts()]
    best = page.locator("#candidates .ac-best").inner_text()
    assert float(best.split(": ")[1]) == max(scores)
    assert page.locator("#search figcaption", has_text="Winner").count() == 1
    page.locator("#pick input").click()
    page.get_by_role("option").nth(1).click()
    page.get_by_role("button", name="Render this one").click()
    page.locator("#search figcaption", has_text="Candidate 1, rendered").wait_for()


def test_an_evaluation_is_started_and_its_report_read_in_place(app, tab):
    one = tab(app.address)
    page = one.page
    one.go("Evaluate")
    page.locator("#start-evaluation").click()
    page.get_by_text("Choose at least one recipe.").wait_for()
    page.get_by_role("textbox", name="Name", exact=True).first.fill("../away")
    page.locator("#evaluate-recipes").get_by_label("digits-dit-1-step").check()
    page.locator("#start-evaluation").click()
    page.get_by_text("contains a path separator").wait_for()
    page.get_by_role("textbox", name="Name", exact=True).first.fill("first")
    page.get_by_role("spinbutton", name="Samples").fill("4")
    page.locator("#start-evaluation").click()
    one.state("#evaluation-status", "finished", patience=240_000)
    frame = page.frame_locator("iframe.ac-report")
    frame.get_by_role("heading", name="zoo:digits-dit", exact=True).wait_for()
    assert "4 pictures of 1 call," in frame.locator("header").inner_text()
    assert frame.locator("text=digits-dit-1-step").count() >= 3
    for image in frame.locator("img").all():
        assert image.evaluate("i => i.complete && i.naturalWidth > 0"), "a picture did not arrive"
    found = json.loads((app.out / REPORTS / "first" / "report.json").read_text())
    estimate = found["recipes"][0]["figures"]["psnr"]["value"]["estimate"]
    assert f"{estimate:.1f}" in frame.locator("table", has_text="PSNR").first.inner_text()
    assert one.errors == []
    page.reload()
    page.locator("#generate").wait_for()
    one.go("Evaluate")
    page.frame_locator("iframe.ac-report").get_by_role(
        "heading", name="zoo:digits-dit", exact=True
    ).wait_for()


@pytest.mark.slow
def test_an_evaluation_is_paused_and_goes_on_after_a_reload(app, tab):
    one = tab(app.address)
    page = one.page
    one.go("Evaluate")
    page.locator("#evaluate-recipes").get_by_label("taylor", exact=False).first.check()
    page.get_by_role("textbox", name="Name", exact=True).first.fill("paused")
    page.get_by_role("spinbutton", name="Samples").fill("60")
    page.locator("#start-evaluation").click()
    page.get_by_text(re.compile(r"[2-9] of \d+ tasks")).wait_for()
    page.get_by_role("button", name="Pause").locator("visible=true").click()
    one.state("#evaluation-status", "paused")
    folder = app.out / REPORTS / "paused"
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "renders").glob("*.json")}
    assert before
    assert not (folder / "report.json").exists()
    page.reload()
    page.locator("#generate").wait_for()
    one.go("Evaluate")
    one.state("#evaluation-status", "paused")
    page.get_by_role("button", name="Continue").click()
    one.state("#evaluation-status", "finished", patience=240_000)
    page.frame_locator("iframe.ac-report").get_by_text("60 pictures").wait_for()
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "renders").glob("*.json")}
    assert {name: after[name] for name in before} == before, "what was done is done once"


@pytest.mark.slow
def test_no_tab_is_wider_than_a_phone(app, tab):
    one = tab(app.address, viewport={"width": 360, "height": 740}, has_touch=True)
    page = one.page
    page.get_by_label("Steps").fill("10")
    page.locator("#generate").click()
    one.state("#trial", "done")
    for name in ("Create", "Compare", "Search", "Batch", "Evaluate", "Recipes"):
        one.go(name)
        page.wait_for_timeout(1000)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, f"{name} is {wide} pixels wide"


@pytest.mark.slow
def test_two_browsers_at_once(app, tab):
    one, two = tab(app.address), tab(app.address)
    two.page.get_by_label("Seed").fill("5")
    one.page.get_by_label("Steps").fill("300")
    one.page.locator("#generate").click()
    one.state("#trial", "running")
    two.page.locator("#generate").click()
    two.page.get_by_text(re.compile("ahead of yours")).wait_for()
    assert one.state("#trial", "done", "failed") == "done"
    assert two.state("#trial", "done", "failed") == "done"
    sources = [t.page.locator("#trial img").first.get_attribute("src") for t in (one, two)]
    assert sources[0] != sources[1], "each sees its own result"


@pytest.mark.slow
def test_create_goes_before_a_batch(app, tab, digits, wait_until):
    one = tab(app.address)
    one.start_batch(digits(30, steps=100), "long")
    one.page.get_by_text(re.compile(r"[1-9]\d* of 30 done")).wait_for(timeout=240_000)
    one.go("Create")
    one.page.get_by_label("Steps").fill("5")
    one.page.locator("#generate").click()
    assert one.state("#trial", "done", "failed") == "done"
    with Ledger.look(app.out / "batches" / "long" / "ledger.sqlite") as ledger:
        assert ledger.counts()["pending"] > 0, "the batch was over: the test shows nothing"
    one.go("Batch")
    one.page.get_by_role("button", name="Cancel", exact=True).last.click()
    wait_until(lambda: _left(app.out / "batches" / "long") == 0)


def _left(folder):
    with Ledger.look(folder / "ledger.sqlite") as ledger:
        counts = ledger.counts()
    return counts["pending"] + counts["running"]
