"""The app's page under axe, which finds what keeps people from using it, in the system's Chromium.

    npm pack axe-core && tar xzf axe-core-*.tgz package/axe.min.js
    python -m benchmarks.bench_page package/axe.min.js

Every tab, after a picture was made, a batch rendered, a search and an evaluation run: in light and
dark, on a desk and on a phone. What is counted are axe's rules: those that hold, those that do not
with their elements, and those that only a person can decide. About two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel.measure import environment, load_average
from benchmarks.results_file import write

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--headless", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TABS = ("Create", "Compare", "Search", "Batch", "Evaluate", "Recipes")
SCHEMES = ("light", "dark")
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
PATIENCE = 240_000  # milliseconds
SETTLES = 2000  # milliseconds until a tab has asked for what it lists
JOBS = "\n".join(
    json.dumps({"seed": i, "inputs": {"class_labels": [37 * i], "num_inference_steps": 5}})
    for i in range(2)
)


def audit(page: Any) -> dict[str, Any]:
    """What axe finds in the page as it is now; its script must be in the page."""
    found = page.evaluate("axe.run().then(r => r)")
    return {
        "holds": len(found["passes"]),
        "undecided": sorted(rule["id"] for rule in found["incomplete"]),
        "violations": {
            rule["id"]: {
                "impact": rule["impact"],
                "help": rule["help"],
                "elements": [node["html"][:160] for node in rule["nodes"]],
            }
            for rule in found["violations"]
        },
    }


def open_tab(page: Any, name: str) -> None:
    """Open one of the app's tabs, also where it hides in the menu of a narrow page."""
    shown = page.get_by_role("tab", name=name, exact=True)
    if shown.count() and shown.first.is_visible():
        shown.first.click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def use(page: Any) -> None:
    """Leave something to see in every tab."""
    page.wait_for_function("document.querySelector('#class input')?.value")
    page.get_by_label("Steps").first.fill("10")
    page.locator("#generate").click()
    page.locator("#trial [data-state=done]").wait_for()
    open_tab(page, "Batch")
    page.locator(".ac-mono textarea").fill(JOBS)
    page.locator("#start-batch").click()
    page.locator("#batch-status [data-state=finished]").wait_for()
    open_tab(page, "Search")
    page.wait_for_function("document.querySelector('#search-prompt textarea')?.value")
    page.get_by_role("spinbutton", name="Steps").last.fill("5")
    page.get_by_role("spinbutton", name="Budget, in renders").fill("3")
    page.locator("#start-search").click()
    page.locator("#search [data-state=done]").wait_for()
    open_tab(page, "Evaluate")
    page.locator("#evaluate-recipes").get_by_label("digits-dit-1-step").check()
    page.get_by_role("spinbutton", name="Samples").fill("4")
    page.locator("#start-evaluation").click()
    page.locator("#evaluation-status [data-state=finished]").wait_for()


@contextmanager
def app(out: Path) -> Iterator[str]:
    """`accel app` in a process of its own; its address."""
    command = [sys.executable, "-m", "apps.cli", "app", "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "w+") as log:
        process = subprocess.Popen(
            command, cwd=out.parent, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            found = re.search(r"accel is at (\S+)", said)
            if found is None:
                log.seek(0)
                raise RuntimeError(f"the app did not start: {said}{log.read()[-500:]}")
            yield found[1]
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("axe", type=Path, help="axe.min.js of npm's axe-core")
    script = parser.parse_args().axe.read_text("utf-8")
    from playwright.sync_api import sync_playwright

    load, rows = load_average(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        app(Path(folder) / "out") as address,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for scheme in SCHEMES:
            for size, (width, height) in SIZES.items():
                view: Any = {"width": width, "height": height}
                page = browser.new_context(viewport=view, color_scheme=scheme).new_page()
                page.set_default_timeout(PATIENCE)
                page.goto(address)
                use(page)
                page.evaluate(script)
                for name in TABS:
                    open_tab(page, name)
                    page.wait_for_timeout(SETTLES)
                    rows.append({"tab": name, "scheme": scheme, "size": size, **audit(page)})
                    print(rows[-1], flush=True)
                axe = page.evaluate("axe.version")
                page.context.close()
        versions = {"axe-core": axe, "chromium": browser.version}
        browser.close()
    block = environment("cpu", load)
    block = {**block, "versions": {**block["versions"], **versions}}
    write("page", "cpu", {"environment": block, "protocol": None, "rows": rows})


def table(result: dict[str, Any]) -> str:
    """What axe found, as Markdown."""
    env, rows = result["environment"], result["rows"]
    broken = sorted({(r, v["impact"], v["help"]) for row in rows for r, v in
                     row["violations"].items()})  # fmt: skip
    undecided = sorted({rule for row in rows for rule in row["undecided"]})
    where = f"{len(SIZES)} sizes of window, light and dark"
    lines = [
        f"axe-core {env['versions']['axe-core']} in Chromium {env['versions']['chromium']}, "
        f"{env['date']}: {len(rows)} views (every tab in {where}); in each "
        f"{min(r['holds'] for r in rows)} to {max(r['holds'] for r in rows)} rules hold and "
        f"{max(len(r['violations']) for r in rows)} at most do not.",
        "",
        "| rule that does not hold | impact | what it says | views | elements at most |",
        "|---|---|---|---|---|",
    ]
    for rule, impact, words in broken:
        counts = [len(r["violations"][rule]["elements"]) for r in rows if rule in r["violations"]]
        lines.append(f"| {rule} | {impact} | {words} | {len(counts)} | {max(counts)} |")
    if not broken:
        lines = lines[:1]
    said = ", ".join(undecided) if undecided else "nothing"
    return "\n".join([*lines, "", f"Left to a person to decide: {said}."])


if __name__ == "__main__":
    main()
