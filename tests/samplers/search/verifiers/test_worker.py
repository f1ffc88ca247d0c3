"""Verifiers in other processes, alive and dead."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from samplers.search.verifiers.worker import HttpVerifier, ProcessVerifier, WorkerError

ROOT = Path(__file__).parents[4]
SAMPLES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
PROMPTS = ["a", "b"]
PRELUDE = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
SERVE = PRELUDE + "from samplers.search.verifiers.worker import serve; "


def python(code):
    return ProcessVerifier([sys.executable, "-c", code], name="mine")


def test_a_worker_scores_what_it_is_sent():
    mean = python(SERVE + "serve(lambda s, p: print('hello') or s.mean((1, 2, 3)))")
    for _ in range(2):  # the same process answers again
        assert mean.score(SAMPLES, PROMPTS) == pytest.approx(SAMPLES.mean((1, 2, 3)))
    videos = SAMPLES.reshape(2, 2, 2, 4, 3)
    shape = python(SERVE + "serve(lambda s, p: [s.ndim, float('nan')])")
    assert shape.score(videos, PROMPTS)[0] == 5
    assert np.isnan(shape.score(videos, PROMPTS)[1])
    mean.close()
    shape.close()


def test_a_worker_that_dies_says_why():
    dead = python("import sys; sys.stderr.write('no weights'); sys.exit(3)")
    with pytest.raises(WorkerError, match="no weights"):
        dead.score(SAMPLES, PROMPTS)
    dead.close()


def test_a_worker_that_is_late_is_ended():
    late = ProcessVerifier([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5)
    with pytest.raises(WorkerError):
        late.score(SAMPLES, PROMPTS)
    late.close()


def test_nonsense_is_an_error():
    odd = python("import sys\nfor line in sys.stdin: print('{\"scores\": [1]}', flush=True)")
    with pytest.raises(WorkerError, match="not 2 scores"):
        odd.score(SAMPLES, PROMPTS)
    odd.close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [len(p) for p in asked["prompts"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): ...


def test_a_server_scores():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        assert HttpVerifier(url).score(SAMPLES, ["abc", "d"]).tolist() == [3, 1]
        server.shutdown()
    with pytest.raises(WorkerError):
        HttpVerifier(url, seconds=2).score(SAMPLES, PROMPTS)
