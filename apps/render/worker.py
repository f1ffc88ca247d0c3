"""The worker: holds one loaded pipeline and renders tasks with it, one at a time.

The same object serves every executor. It knows no ledger: it gets a payload, reports events, and
either has committed the files and returns their result, or raises.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import accel
from accel.device import seeded_rng
from accel.files import remove
from accel.loading import quiet_loading
from apps.render import latents as latents_file
from apps.render import stages
from apps.render.attaching import attached, attached_to_decoder, from_noise
from apps.render.environment import versions
from apps.render.faults import InvalidJob, NotFinite, classify
from apps.render.identity import model_revision
from apps.render.outputs import commit, encode_all, result_of
from apps.render.plan import recipe_sha256
from apps.render.sentinels import suspicion
from apps.render.watch import Parts, seen, watched
from apps.render.worker_settings import WORK_FOLDER, WorkerSettings
from apps.search import SearchRequest, drafts, run_search, story, write_record
from samplers.search.path import Path as NoisePath
from samplers.search.path import read_path

# A model that cannot be loaded is not tried for each of a thousand jobs; but files come back.
FORGET_SECONDS = 60.0
Emit = Callable[[dict[str, Any]], None]
# Tasks of other kinds: a function (worker, task id, payload) -> content of the sidecar, imported
# when one comes.
KINDS = {"evaluate": "apps.evaluation.tasks:run"}


class Worker:
    """Renders tasks.

    Attributes:
        emit: gets events while a task runs.
        check: called between two steps; may raise Stopped.
        out: the folder of the next task's files.
        watch: events also say which parts of the denoiser ran, and what a search sees (`watch.py`).
    """

    def __init__(self, settings: WorkerSettings):
        self.emit: Emit = lambda event: None
        self.check: Callable[[], None] = lambda: None
        self.out = Path(settings.out)
        self.watch = False
        self._settings = settings
        self._pipe: Any = None
        self._loaded: tuple[Any, ...] | None = None
        self._uncut: set[tuple[Any, ...]] = set()
        self._broken: dict[tuple[Any, ...], tuple[float, str]] = {}

    def run(self, task_id: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Render one task to finished files; return what the ledger keeps of it.

        Raises:
            Stopped: `check` asked for it; nothing is lost.
            Exception: any failure, to be sorted by `faults.classify`.
        """
        if payload.get("kind", "render") != "render":
            module, _, name = KINDS[payload["kind"]].partition(":")
            return result_of(getattr(importlib.import_module(module), name)(self, task_id, payload))
        started = time.perf_counter()
        kept = self.out / WORK_FOLDER / f"{task_id}.safetensors"
        with _threads(payload["threads"]):
            latents = latents_file.read(kept)
            if latents is None:
                latents = self._denoise(payload, kept)
            self.emit({"event": "stage", "stage": "denoise"})
            frames, story = self._decode(payload, latents, kept)
            self.emit({"event": "stage", "stage": "decode"})
            story["timings"]["total"] = time.perf_counter() - started
            content = self._write(task_id, payload, frames, story)
        remove(kept)
        shutil.rmtree(kept.with_suffix(".search"), ignore_errors=True)
        return result_of(content)

    def close(self) -> None:
        """Let the pipeline go."""
        self._pipe = self._loaded = None
        _free_memory()

    # stages

    def _denoise(
        self,
        payload: dict,
        kept: Path,
        without: str | None = None,
        found: dict[str, Any] | None = None,
    ) -> latents_file.Latents:
        """Denoise and keep the latents; a recipe that yields NaN is left out once.

        `without` is the reason to leave the recipe out, and becomes part of the story; what a
        search has `found` under the recipe is denoised then, and nothing is searched again.
        """
        pipe = self.pipeline(payload)
        inputs = payload["job"]["inputs"]
        stages.check_inputs(pipe, inputs)
        recipe = self._recipe(payload) if without is None else None
        if without is None:
            found = self._search(pipe, payload, kept, recipe)
        if found and found["drafts"]:
            recipe = None
        noise = found["path"] if found else payload["job"].get("noise")
        path = None if noise is None else read_path(noise)
        latents, story = self._call(pipe, inputs, payload, recipe, path)
        story |= {"search": found} if found else {}
        if without is not None:
            story["fallback"] = {"reason": without, "recipe": payload["recipe_sha256"]}
        latents = latents_file.Latents(latents.mode, latents.args, latents.kwargs, story)
        if not latents.is_finite():
            if recipe is None:
                raise NotFinite("the output is not finite (NaN), without acceleration too")
            return self._denoise(payload, kept, without="nan", found=found)
        with contextlib.suppress(latents_file.CannotKeep):  # then a failed decode costs a denoise
            latents_file.write(kept, latents)
        return latents

    def _decode(
        self, payload: dict, latents: latents_file.Latents, kept: Path
    ) -> tuple[Any, dict[str, Any]]:
        """Decode and judge the frames; a suspicious accelerated output is made again without."""
        frames = self._decode_once(payload, latents)
        wrong = suspicion(frames)
        if wrong and _under_recipe(payload, latents.story):
            found = latents.story.get("search")
            latents = self._denoise(payload, kept, without=wrong, found=found)
            frames = self._decode_once(payload, latents)
            wrong = suspicion(frames)
        if wrong == "nan":
            raise NotFinite("the decoded frames are not finite (NaN), without acceleration too")
        if wrong:
            latents.story["notes"].append(f"the output is {wrong}, without acceleration too")
        return stages.quantise(frames), latents.story

    def _decode_once(self, payload: dict, latents: latents_file.Latents) -> Any:
        pipe = self.pipeline(payload)
        recipe = self._recipe(payload) if _under_recipe(payload, latents.story) else None
        started = time.perf_counter()
        with attached_to_decoder(recipe, pipe, payload["strict"]):
            try:
                frames = stages.decode(pipe, latents)
            except Exception as error:
                if classify(error).error_class != "memory" or latents.mode != "decode":
                    raise
                _free_memory()
                frames = stages.decode_tiled(pipe, latents)
                latents.story["notes"].append("decoded in tiles: the whole did not fit into memory")
        latents.story["timings"]["decode"] = time.perf_counter() - started
        return frames

    def _write(self, task_id: str, payload: dict, frames: Any, story: dict) -> dict[str, Any]:
        job, stem = payload["job"], payload["stem"]
        record = {"identity": task_id, "stem": stem, "payload": payload, "versions": versions()}
        if "search" in story:
            record["search"] = story["search"]
        if payload.get("native") and frames[0].ndim == 4:
            from apps.evaluation.vbench.native import native

            story["native"] = native(frames[0])
        media = encode_all(
            frames,
            stem=stem,
            kind=job["format"],
            fps=job["fps"],
            record=record if payload["metadata"] else None,
            raw=payload.get("raw", False),
        )
        return commit(self.out, stem, media, record | story)

    def _search(
        self, pipe: Any, payload: dict, kept: Path, recipe: accel.Recipe | None
    ) -> dict[str, Any] | None:
        """Search the job's noise if it asks for that; returns what the sidecar keeps of it.

        Its journal lies beside the latents, so a search that is cut off goes on from there.
        """
        if "search" not in payload["job"]:
            return None
        request = SearchRequest.model_validate(payload["job"]["search"])

        def observe(progress: Any) -> None:
            self.check()
            best = progress.best.score if progress.best else None
            shown = {"share": round(progress.share, 4), "evaluations": progress.evaluations}
            if self.watch:
                shown["candidates"] = [seen(candidate) for candidate in progress.candidates]
            self.emit({"event": "search", "best": best, "verifier": request.verifier, **shown})

        journal = kept.with_suffix(".search")
        try:
            result = run_search(
                request,
                pipe,
                payload["job"]["inputs"],
                recipe,
                seed=payload["job"]["seed"],
                journal=journal,
                trusted=kept.stem in self._settings.trusted,
                observe=observe,
            )
        except ValueError as error:
            raise InvalidJob(str(error)) from error
        write_record(self.out, payload["stem"], result)
        return {**story(result), "drafts": drafts(request)}

    # the pipeline

    def _call(
        self, pipe: Any, inputs: dict, payload: dict, recipe: accel.Recipe | None, path: Any
    ) -> tuple[latents_file.Latents, dict[str, Any]]:
        """One denoise under a recipe; returns latents and their story (report, timings, notes)."""
        marks = {"start": time.perf_counter()}

        def on_event(event: Any) -> None:
            marks.setdefault(event.kind, time.perf_counter())
            if event.kind == "step":
                step = {"event": "step", "step": event.step + 1, "steps": event.steps}
                self.emit(step | (parts.take() if parts is not None else {}))
                self.check()

        with warnings.catch_warnings(record=True) as caught, self._watched(pipe) as parts:
            warnings.simplefilter("always")
            latents, report = self._attached_call(pipe, inputs, payload, recipe, path, on_event)
        now = time.perf_counter()
        first = marks.get("run", marks["start"])
        notes = [f"{w.category.__name__}: {w.message}" for w in caught if _is_ours(w)]
        ran = {"ran": parts.as_json()} if parts is not None else {}
        return latents, ran | {
            "report": report,
            "call_changes": recipe.call_changes() if recipe else {},
            "notes": notes + latents.story.get("notes", []),
            "timings": {"encode": first - marks["start"], "denoise": now - first},
        }

    def _watched(self, pipe: Any) -> contextlib.AbstractContextManager[Parts | None]:
        return watched(pipe) if self.watch else contextlib.nullcontext()

    def _attached_call(
        self,
        pipe: Any,
        inputs: dict,
        payload: dict,
        recipe: Any,
        path: NoisePath | None,
        on_event: Callable,
    ) -> tuple[latents_file.Latents, dict[str, Any] | None]:
        seed, count = payload["job"]["seed"], stages.sample_count(inputs)
        changes = recipe.call_changes() if recipe else {}
        for cut in (True, False):
            if cut and self._loaded in self._uncut:
                continue
            arguments = {**inputs, **changes, "generator": stages.generators(seed, count)}
            try:
                with (
                    seeded_rng(seed),
                    attached(recipe, pipe, payload["strict"], on_event) as live,
                    from_noise(pipe, inputs, recipe, live, path) as own,
                ):
                    latents = stages.denoise(pipe, own or arguments, cut=cut)
                return latents, None if live is None else live.report()
            except stages.Uncut:
                self._uncut.add(self._loaded or ())
            except accel.NoEffectError as error:
                raise InvalidJob(str(error)) from error
        raise AssertionError("an uncut call never raises Uncut")

    def pipeline(self, payload: dict[str, Any]) -> Any:
        """The pipeline of a payload, loaded once; the model must be what was planned with."""
        key = (payload["model"], payload["model_revision"], payload["dtype"], payload["device"])
        if self._loaded == key:
            return self._pipe
        failed, why = self._broken.get(key, (-math.inf, ""))
        if time.monotonic() - failed < FORGET_SECONDS:
            raise InvalidJob(why)
        self.close()
        self.emit({"event": "loading", "model": payload["model"]})
        revision = model_revision(payload["model"])
        if revision != payload["model_revision"]:
            raise InvalidJob(
                f"model {payload['model']} has changed since this job was submitted;"
                " submit it again"
            )
        pipe = self._load(payload, key)
        for live in reversed(accel.live_on(pipe)):
            live.detach()  # a folder's own recipe is one of the payload, so that it can be left out
        pipe.set_progress_bar_config(disable=True)
        self._pipe, self._loaded = pipe, key
        return pipe

    def _load(self, payload: dict[str, Any], key: tuple[Any, ...]) -> Any:
        try:
            with quiet_loading():
                return accel.load(
                    payload["model"],
                    dtype=getattr(torch, payload["dtype"]),
                    device=self._device(payload["device"]),
                    trust_remote_code=self._settings.trust_remote_code,
                )
        except (OSError, ValueError, TypeError, ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            why = f"model {payload['model']} cannot be loaded: {reason}"
            self._broken[key] = (time.monotonic(), why)
            raise InvalidJob(why) from error

    def _device(self, kind: str) -> str:
        """The device of this worker: CUDA devices are dealt out by the worker's number."""
        if kind != "cuda":
            return kind
        return f"cuda:{self._settings.number % max(1, torch.cuda.device_count())}"

    def _recipe(self, payload: dict[str, Any]) -> accel.Recipe | None:
        if payload["recipe"] is None:
            return None
        if recipe_sha256(payload["recipe"]) != payload["recipe_sha256"]:
            raise InvalidJob(
                f"recipe {payload['recipe']} has changed since this job was submitted; "
                "submit it again"
            )
        return accel.read_recipe(payload["recipe"]).recipe


def _under_recipe(payload: dict, story: dict) -> bool:
    """Whether latents were made under the payload's recipe: one of drafts makes no winner."""
    drafted = (story.get("search") or {}).get("drafts", False)
    return payload["recipe"] is not None and not drafted and "fallback" not in story


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_ours(caught: warnings.WarningMessage) -> bool:
    ours = (accel.NoEffectWarning, accel.FallbackWarning, accel.GuidanceWarning)
    return issubclass(caught.category, ours)
