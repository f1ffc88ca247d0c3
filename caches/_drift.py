"""How a denoiser's outputs drift over a run, and the steps worth computing because of it.

One uncached run records, for every column, the inner products of its outputs at all pairs of steps.
From them follows the error of any forecast, from any computed steps to any step, without running
the network again; and from those errors the best steps to compute, by dynamic programming.
Memory: up to `SAMPLED` numbers a column and step.
"""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from accel.clock import Run
from accel.denoiser import denoisers
from accel.files import write_atomically
from accel.measure import pipeline_samples
from accel.method import Attached, Claim, Method, attached
from caches._hookable import call_claim
from caches._outputs import first_leaf
from caches.schedule import noise_share

SAMPLED = 1 << 16  # numbers of an output that are looked at, evenly spread


@dataclass
class Drift:
    """Of one run: noise shares (steps,), and of every column inner products and seconds a call.

    products[column][i, j] = <output at i, output at j> / |output|^2 over the run, first branch.
    """

    shares: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    products: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rest: float = 0.0  # seconds outside of all columns, for each call of the denoiser
    guided: bool | None = None  # whether the run was

    def save(self, path: Path, digest: str) -> None:
        """Write it, with the digest of what it was measured for."""
        arrays: dict[str, Any] = {f"products/{c}": p for c, p in self.products.items()}
        head = {**vars(self), "digest": digest}
        head.pop("products")
        buffer = io.BytesIO()
        np.savez(buffer, head=json.dumps(head), **arrays)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> tuple[Drift, str]:
        """What `save` wrote, and the digest."""
        with np.load(io.BytesIO(path.read_bytes())) as file:  # closes where it is damaged, too
            head = json.loads(str(file["head"]))
            products = {k.partition("/")[2]: file[k] for k in file.files if k != "head"}
        digest = head.pop("digest")
        shares, sigmas = tuple(head.pop("shares")), tuple(head.pop("sigmas"))
        return cls(shares, sigmas, products, **head), digest


def measure_drift(pipe: Any, arguments: dict[str, Any], columns: tuple[str, ...]) -> Drift:
    """The drift of one uncached call, after one to warm up."""
    with attached(_DriftProbe(columns), pipe) as live:
        assert isinstance(live, _LiveProbe)
        pipeline_samples(pipe, arguments, 0)
        live.times.clear()
        begin = time.perf_counter()
        pipeline_samples(pipe, arguments, 0)
        return live.drift(time.perf_counter() - begin)


@dataclass(frozen=True)
class _DriftProbe(Method):
    """Looks on during one run; every step computes."""

    watched: tuple[str, ...] = ()

    def neutral(self) -> Method:
        return self

    def claims(self, pipe: Any) -> frozenset[Claim]:
        return frozenset({call_claim(pipe)})

    def new_live(self, pipe: Any) -> Attached:
        return _LiveProbe(self, pipe)

    def build(self, pipe: Any, live: Attached) -> None:
        assert isinstance(live, _LiveProbe)
        for denoiser in denoisers(pipe):
            for column in self.watched:
                slot, _, path = column.partition(".")
                if slot == denoiser.slot and path:
                    live.around_call(denoiser.module.get_submodule(path), live.watch(column))
                elif slot == denoiser.slot:
                    live.around_denoiser(slot, live.watch(column))


class _LiveProbe(Attached):
    """Samples of outputs by column and step, and the seconds they took."""

    def __init__(self, method: Method, pipe: Any) -> None:
        super().__init__(method, pipe)
        self.samples: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        self.times: dict[str, list[float]] = defaultdict(list)
        self.sigmas: tuple[float, ...] = ()
        self.calls = 0

    def on_run_end(self, run: Run) -> None:
        self.sigmas, self.calls = run.step_sigmas, run.calls

    def watch(self, column: str) -> Callable:
        """The layer of one column."""
        import torch

        def layer(call_next: Callable, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            output = call_next(*args, **kwargs)
            leaf = first_leaf(output)
            if leaf.is_cuda:
                torch.cuda.synchronize()
            self.times[column].append(time.perf_counter() - begin)
            now, run = self.clock.now, self.clock.run
            assert now is not None
            assert run is not None
            if now.stage == 0 and now.branch == run.branches[0]:
                flat = leaf.detach().float().flatten()
                stride = -(-flat.numel() // SAMPLED)
                self.samples[column][now.step] = flat[::stride].cpu().numpy()
            return output

        return layer

    def drift(self, seconds: float) -> Drift:
        """What was seen in a run of so many seconds."""
        found = Drift(noise_share(self.sigmas), self.sigmas, guided=self.guided)
        steps = len(self.sigmas)
        for column, by_step in self.samples.items():
            table = np.stack([by_step[i] for i in sorted(by_step)])
            products = table @ table.T
            scale = products.trace() / len(by_step)
            full = np.zeros((steps, steps))
            full[np.ix_(sorted(by_step), sorted(by_step))] = products / max(scale, 1e-30)
            found.products[column] = full
            found.seconds[column] = float(np.median(self.times[column]))
        outermost = [
            c for c in found.seconds if not any(c.startswith(o + ".") for o in found.seconds)
        ]
        inside = sum(sum(self.times[c]) for c in outermost)
        found.rest = max(seconds - inside, 0.0) / self.calls
        return found


def forecast_errors(products: np.ndarray, shares: Sequence[float], order: int) -> np.ndarray:
    """Squared relative errors E[a, b, s] of forecasting step s from the computed steps a < b < s.

    With order 0, or where a = b (only one is known), b is repeated. Orders above 1 count as 1.
    """
    n = len(shares)
    u = np.asarray(shares)
    diagonal = np.diag(products)
    a, b, s = np.meshgrid(*(np.arange(n),) * 3, indexing="ij")
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.where((a < b) & (order > 0), (u[s] - u[b]) / (u[b] - u[a]), 0.0)
    far = np.nan_to_num(far, posinf=0.0, neginf=0.0)
    wb, wa = 1 + far, -far
    error = (
        wa**2 * diagonal[a]
        + wb**2 * diagonal[b]
        + diagonal[s]
        + 2 * (wa * wb * products[a, b] - wa * products[a, s] - wb * products[b, s])
    )
    return np.where((a <= b) & (b < s), np.maximum(error, 0.0), 0.0)


def best_steps(errors: np.ndarray, weights: np.ndarray, price: float) -> tuple[int, ...]:
    """Steps to compute that minimise weighted errors plus `price` for each computed step.

    errors: of `forecast_errors`; weights: (steps,) of the errors. Step 0 is always computed.
    Exact: dynamic programming over the last two computed steps.
    """
    n = errors.shape[0]
    # run[a, b, c]: cost of the steps after b and before c
    run = np.zeros((n, n, n + 1))
    run[:, :, 1:] = np.cumsum(errors * weights, axis=2)
    run -= run[:, np.arange(n), np.minimum(np.arange(n) + 1, n)][:, :, None]
    best = np.full((n, n), np.inf)  # [a, b]: the two newest computed steps
    before = np.zeros((n, n), dtype=int)
    best[0, 0] = price
    for b in range(n):
        for c in range(b + 1, n):
            ways = best[: b + 1, b] + run[: b + 1, b, c]
            a = int(ways.argmin())
            best[b, c], before[b, c] = ways[a] + price, a
    ends = best + run[:, :, n]
    a, b = np.unravel_index(int(np.where(np.isfinite(ends), ends, np.inf).argmin()), ends.shape)
    found = [int(b)]
    while a != b:
        found.append(int(a))
        a, b = before[a, b], a
    return tuple(sorted(set(found)))
