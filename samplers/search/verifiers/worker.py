"""A verifier in another process: for models that cannot live in this environment.

Requests and replies are JSON, one a line on a process's pipes, or the body of an HTTP POST:

    {"shape": [n, h, w, c], "frames": "<base64 of uint8>", "prompts": ["...", ...]}
    {"scores": [0.3, null, ...]}                   null: could not be scored

``serve`` is the other side, for a worker written in Python; it needs this file, numpy and no more.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

KEPT_LINES = 20  # of what a worker says on stderr


class WorkerError(RuntimeError):
    """A worker died, answered nonsense or did not answer in time."""


class _Remote:
    """What both kinds share."""

    range = (float("-inf"), float("inf"))

    def score(self, samples: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Raises ``WorkerError``: a search stops, and goes on from its journal."""
        reply = self.ask(request(samples, prompts))
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != len(samples):
            raise WorkerError(f"{self!r} answered {str(reply)[:200]}, not {len(samples)} scores")
        return np.array([np.nan if s is None else float(s) for s in scores])

    def ask(self, message: bytes) -> Any:
        raise NotImplementedError


class ProcessVerifier(_Remote):
    """A command that reads requests on its standard input; started at the first score, kept."""

    def __init__(self, command: str | Sequence[str], *, name: str = "", seconds: float = 600):
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.command:
            raise ValueError("ProcessVerifier: an empty command")
        self.name = name or self.command[-1].rsplit("/", 1)[-1]
        self.fingerprint = f"{self.name}:{shlex.join(self.command)}"
        self.seconds = seconds
        self._process: subprocess.Popen | None = None
        self._listener: threading.Thread | None = None
        self._said: list[str] = []

    def __repr__(self) -> str:
        return f"worker {shlex.join(self.command)!r}"

    def ask(self, message: bytes) -> Any:
        process = self._started()
        late = threading.Timer(self.seconds, process.kill)
        late.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(message + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            return json.loads(line)
        except (OSError, ValueError) as error:
            process.kill()
            code = process.wait()
            self.close()
            said = " | ".join(self._said[-3:])
            raise WorkerError(f"{self!r} ended ({code}): {said or error}") from None
        finally:
            late.cancel()

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            pipe = subprocess.PIPE
            self.close()
            self._process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=pipe)
            self._listener = threading.Thread(target=self._listen, args=(self._process,))
            self._listener.daemon = True
            self._listener.start()
        return self._process

    def _listen(self, process: subprocess.Popen) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._said.append(line.decode(errors="replace").strip())
            del self._said[:-KEPT_LINES]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        process.wait()
        if self._listener is not None:
            self._listener.join(1)
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):  # a refused command has none
            self.close()


class HttpVerifier(_Remote):
    """A server that takes requests as POST bodies."""

    def __init__(self, url: str, *, name: str = "", seconds: float = 600):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"HttpVerifier: {url!r} is no http(s) address")
        self.url, self.seconds = url, seconds
        self.name = name or url.split("//", 1)[1]
        self.fingerprint = url

    def __repr__(self) -> str:
        return self.url

    def ask(self, message: bytes) -> Any:
        head = {"Content-Type": "application/json"}
        try:
            asked = urllib.request.Request(self.url, message, head)
            with urllib.request.urlopen(asked, timeout=self.seconds) as answer:
                return json.loads(answer.read())
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise WorkerError(f"{self.url}: {error}") from None


def request(samples: np.ndarray, prompts: Sequence[str]) -> bytes:
    """One request as a line of JSON."""
    data = base64.b64encode(np.ascontiguousarray(samples).tobytes()).decode()
    return json.dumps({"shape": samples.shape, "frames": data, "prompts": list(prompts)}).encode()


def serve(score: Callable[[np.ndarray, list[str]], Any]) -> None:
    """Answer requests from standard input with ``score(samples, prompts)`` until it ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what the function prints must not be taken for an answer
    for line in sys.stdin:
        asked = json.loads(line)
        samples = np.frombuffer(base64.b64decode(asked["frames"]), np.uint8)
        scores = np.asarray(score(samples.reshape(asked["shape"]), asked["prompts"]), float)
        print(json.dumps({"scores": [x if np.isfinite(x) else None for x in scores.tolist()]}),
              file=out, flush=True)  # fmt: skip
