"""Ctrl-C on a real program with worker processes: it ends at once, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apps.render.ledger import Ledger

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_of_the_whole_group(tmp_path, tiny_model, job_file, rows, workers):
    jobs = rows(40)
    for job in jobs:
        job["inputs"]["num_inference_steps"] = 100
    out = tmp_path / "out"
    command = [sys.executable, "-m", "apps.cli", "render", str(job_file(jobs))]
    command += ["--model", tiny_model, "--out", str(out), "--device", "cpu"]
    command += ["--progress", "json", "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as program:
        pids = set()
        for number, line in enumerate(program.stdout):
            event = json.loads(line)
            pids |= {event["pid"]} if "pid" in event else set()
            if number == 150:
                os.killpg(program.pid, signal.SIGINT)
                asked = time.monotonic()
        assert program.wait() == 130
    assert time.monotonic() - asked < 10, "a step takes milliseconds"
    assert len(pids) == workers
    time.sleep(0.5)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "a worker was left behind"
    with Ledger.open(out / "ledger.sqlite") as ledger:
        counts = ledger.counts()
        assert counts["running"] == counts["failed"] == 0
        assert counts["pending"] > 0
        assert all(task.attempts == 0 for task in ledger.tasks("pending"))
