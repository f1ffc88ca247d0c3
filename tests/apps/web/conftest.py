"""A running app, a browser that reports every host it asks for anything, a device in place."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.bench_page import CHROMIUM, FLAGS, open_tab

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 60_000  # milliseconds; a busy machine is no failure


@dataclass
class Served:
    """`accel app` in a process of its own."""

    out: Path
    address: str
    process: subprocess.Popen
    log: Path

    def get(self, path, **headers):
        """(status, body) of a plain request."""
        request = urllib.request.Request(self.address.rstrip("/") + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def kill(self):
        """As if the machine had lost it."""
        self.process.kill()
        self.process.wait(10)

    def end(self):
        """As Ctrl-C; nothing may have gone wrong unseen."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
        assert "Traceback" not in self.log.read_text()


@pytest.fixture(scope="session")
def serve():
    """`serve(out, *options)`: a running app."""
    return _serve


def _serve(out, *arguments):
    """Start an app on a free port and wait until it says where it is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = out.with_name(f"{out.name}-{time.time_ns()}.log")
    command = [sys.executable, "-m", "apps.cli", "app", "--out", out, "--device", "cpu"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*map(str, [*command, "--port", _free_port(), *arguments])],
            env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=out.parent,
        )  # fmt: skip
    while process.poll() is None:
        found = re.search(r"accel is at (\S+)", log.read_text())
        if found:
            return Served(out, found[1], process, log)
        time.sleep(0.1)
    raise AssertionError(f"the app did not start: {log.read_text()}")


def _free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="session")
def app(tmp_path_factory, tiny_model):
    """One app for all tests that do not kill it; its first model is zoo:digits-dit."""
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install -e '.[app]'")
    served = _serve(tmp_path_factory.mktemp("app") / "out", "--model", tiny_model)
    yield served
    served.end()


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium, or a reason to skip."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    with playwright.sync_playwright() as one:
        browser = one.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Tab:
    """A page of the app with the words that tests need."""

    page: object
    hosts: set = field(default_factory=set)
    errors: list = field(default_factory=list)

    def open(self, address):
        self.page.goto(address)
        self.page.locator("#generate").wait_for(timeout=PATIENCE)
        self.ready()

    def ready(self):
        """Wait until the form knows what the model can be asked for."""
        self.page.wait_for_function(
            "document.querySelector('#class input')?.value"
            " || document.querySelector('#prompt textarea')?.value",
            timeout=PATIENCE,
        )

    def go(self, name):
        """Open one of the app's tabs."""
        open_tab(self.page, name)

    def state(self, selector, *states, patience=PATIENCE):
        """Wait until the trial or batch is in one of these states; return which."""
        wanted = ",".join(f"{selector} [data-state={state}]" for state in states)
        self.page.locator(wanted).first.wait_for(timeout=patience)
        return self.page.locator(wanted).first.get_attribute("data-state")

    def start_batch(self, rows, name=None):
        """Write jobs into the Batch tab and start them."""
        self.go("Batch")
        if name is not None:
            self.page.get_by_role("textbox", name="Name", exact=True).fill(name)
        lines = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        self.page.locator(".ac-mono textarea").fill(lines)
        self.page.locator("#start-batch").click()


@pytest.fixture
def tab(chromium):
    """`tab(address, **context)`: a page in a browser context of its own (its own storage)."""
    contexts = []

    def make(address, **context):
        contexts.append(
            chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        made = Tab(page)
        page.on("request", lambda request: made.hosts.add(request.url))
        page.on("pageerror", lambda error: made.errors.append(str(error)))
        made.open(address)
        return made

    yield make
    for context in contexts:
        context.close()


class Inline:
    """A device that runs work when it is submitted."""

    def __init__(self):
        from apps.render.worker import Worker
        from apps.render.worker_settings import WorkerSettings

        self.worker = Worker(WorkerSettings("."))
        self.ran = []

    def submit(self, work):
        if work.asked:
            work.sink({"event": work.asked})
            return
        from apps.render.executors import outcome
        from apps.render.worker_settings import WORK_FOLDER

        self.ran.append(work)
        (work.out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        self.worker.out, self.worker.watch = work.out, work.watch
        self.worker.emit = work.sink
        work.sink({"event": "start"})
        work.sink(outcome(self.worker, work.task, work.payload))

    def end(self, work, how):
        work.asked = how

    def ahead_of(self, work):
        return 0


@pytest.fixture(scope="session")
def inline():
    """`inline()`: a device that works in place."""
    return Inline


@pytest.fixture
def wait_until():
    """`wait_until(true)`: poll until it is."""

    def wait(true, seconds=60.0):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.1)

    return wait


@pytest.fixture
def digits():
    """`digits(3, steps=50)`: jobs for zoo:digits-dit; 50 steps take about a second."""

    def make(count, steps=50):
        return [
            {"seed": i, "inputs": {"class_labels": [i * 7 % 100], "num_inference_steps": steps}}
            for i in range(count)
        ]

    return make
