"""What an evaluation is asked for, and the tasks that makes: renders, timings, looks.

Every side (the baseline, each recipe) renders the same calls with the same seeds. All tasks go into
one folder with one ledger, so a killed evaluation continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apps.render import strict_json
from apps.render.identity import model_folder, model_revision
from apps.render.jobs import PlacedJob, parse_job, read_jobs
from apps.render.plan import PlannedTask, Settings, plan

KINDS = ("fidelity", "fid", "judge", "clip")
BASELINE = "baseline"
SAMPLES = {"fidelity": 100, "judge": 200, "fid": 500, "clip": 100}  # of a zoo model, by default
MOST_SAMPLES = 1_000_000  # a plan holds them all
CHUNK = 200  # samples that one task looks at, about
ELSE = "or use `accel evaluate fidelity`, which needs none"
SEED = 1000  # of the first sample of a zoo model's calls
_SAFE = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        model: zoo:NAME, a folder or a hub id.
        recipes: recipe files.
        kinds: of `KINDS`, any number.
        against: a recipe file to compare with; None: the model without any.
        jobs: a job file with inputs and seeds; None: a zoo model's own calls.
        samples, steps: of a zoo model's own calls; None: as many as the kinds want.
        rounds: paired timings of each recipe; 0 leaves speeds out.
        features: extractor of distances, `accel.metrics.extractors`; None: a zoo model's judge.
        real: folder of real pictures for `fid`; None: a zoo model's world.
        clip: folder of a CLIP model.
    """

    model: str
    recipes: tuple[str, ...]
    kinds: tuple[str, ...] = ("fidelity",)
    against: str | None = None
    jobs: str | None = None
    samples: int | None = None
    steps: int | None = None
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    features: str | None = None
    real: str | None = None
    clip: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise ValueError(f"evaluate: kind {unknown or 'missing'}; known: {', '.join(KINDS)}")
        if not self.recipes:
            raise ValueError("evaluate: no recipe; give at least one with --recipe FILE")
        for name, least in (("samples", 2), ("steps", 1), ("rounds", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"evaluate: {name} = {value}; at least {least}")
        if self.samples is not None and self.samples > MOST_SAMPLES:
            raise ValueError(f"evaluate: samples = {self.samples}; at most {MOST_SAMPLES:,}")
        if self.rounds == 1:
            raise ValueError("evaluate: rounds = 1 has no interval; 0 (none), or at least 2")

    def as_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def read(cls, record: dict[str, Any]) -> Request:
        """What `as_json` wrote."""
        many = {k: tuple(record[k]) for k in ("recipes", "kinds")}
        return cls(**{**record, **many})


@dataclass(frozen=True)
class Side:
    """One way to render the calls. `label` is for people, `name` for files."""

    name: str
    label: str
    recipe: str | None = None
    sha256: str | None = None
    methods: tuple[dict[str, Any], ...] = ()
    description: str = ""


@dataclass(frozen=True)
class Plan:
    """A checked request: sides (the baseline first), calls, and one render task for each pair."""

    request: Request
    sides: tuple[Side, ...]
    calls: tuple[dict[str, Any], ...]  # {"inputs", "seed", "samples", "labels"}
    renders: dict[str, tuple[PlannedTask, ...]] = field(repr=False)
    model: dict[str, Any] = field(repr=False)
    features: str | None = None
    referee: bool = False

    @property
    def samples(self) -> int:
        return sum(call["samples"] for call in self.calls)


def make_plan(request: Request) -> Plan:
    """Check a request and resolve everything in it; nothing is rendered.

    Raises:
        ValueError: the model, a recipe, the calls or an option is not usable, in one line each.
        FileNotFoundError: no recipe or job file at a path.
    """
    from accel.metrics.extractors import require
    from accel.metrics.manifold import FEWEST
    from apps.evaluation.frames import require_pictures

    revision = model_revision(request.model)
    calls = _calls(request)
    sides = (_side(request.against, BASELINE), *_named(request.recipes))
    features, referee = _judges(request, calls)
    if features is not None:
        require(features)
    if request.real is not None and "fid" in request.kinds:
        require_pictures(Path(request.real))
    samples = sum(call["samples"] for call in calls)
    if features is not None and samples < FEWEST:
        raise ValueError(f"evaluate fid: samples = {samples}; at least {FEWEST}")
    if "clip" in request.kinds:
        if request.clip is None:
            raise ValueError("evaluate clip: give a folder with a CLIP model (--clip FOLDER)")
        if not (Path(request.clip) / "config.json").is_file():
            raise ValueError(f"evaluate clip: {request.clip}: no config.json of a CLIP model there")
        if not all("prompt" in call["inputs"] for call in calls):
            raise ValueError("evaluate clip: every call needs a prompt")
    settings = Settings(
        model=request.model, threads=request.threads, dtype=request.dtype, device=request.device,
        metadata=False, raw=True,
    )  # fmt: skip
    return Plan(
        request,
        sides,
        tuple(calls),
        {side.name: tuple(_renders(side, calls, settings)) for side in sides},
        {"name": request.model, "revision": revision},
        features,
        referee,
    )


def time_tasks(made: Plan) -> list[PlannedTask]:
    """Paired timings, one task a recipe, on the first call."""
    if not made.request.rounds:
        return []
    base = made.sides[0]
    call = {k: made.calls[0][k] for k in ("inputs", "seed")}
    return [
        _task(made, f"time-{side.name}", side, {
            "what": "time", "base": base.recipe, "base_sha256": base.sha256, "call": call,
            "rounds": made.request.rounds,
        })
        for side in made.sides[1:]
    ]  # fmt: skip


def look_tasks(made: Plan, lost: set[int]) -> list[PlannedTask]:
    """Looks at what was rendered, some calls at a time; and at real samples. `lost`: calls that
    some side failed to render, which are left out of all.

    Other weights or real pictures at the same place make other tasks.
    """
    from accel.metrics.extractors import extractor_sha256, weights_sha256
    from apps.evaluation.frames import pictures_sha256

    request = made.request
    features_sha256 = None if made.features is None else extractor_sha256(made.features)
    clip = request.clip if "clip" in request.kinds else None
    kept = [i for i in range(len(made.calls)) if i not in lost]
    common = {
        "kinds": list(request.kinds), "features": made.features, "clip": request.clip,
        "referee": made.referee, "features_sha256": features_sha256,
        "clip_sha256": None if clip is None else weights_sha256(Path(clip)),
    }  # fmt: skip
    tasks = []
    for side in made.sides:
        for number, rows in enumerate(_chunks(made.calls, kept)):
            ours, base = made.renders[side.name], made.renders[BASELINE]
            calls = [_look_at(made.calls[i], ours[i], base[i]) for i in rows]
            more = {"what": "look", "calls": calls, "base": side.name != BASELINE, **common}
            tasks.append(_task(made, f"look-{side.name}-{number:04d}", side, more))
    if made.features is not None:
        inputs = [made.calls[i]["inputs"] for i in kept]
        samples = sum(made.calls[i]["samples"] for i in kept)
        real = request.real
        more = {
            "what": "real", "inputs": inputs, "samples": samples, "real": real,
            "real_sha256": None if real is None else pictures_sha256(Path(real)),
            "features": made.features, "features_sha256": features_sha256,
        }  # fmt: skip
        tasks.append(_task(made, "real", made.sides[0], more))
    return tasks


def _look_at(call: dict[str, Any], ours: PlannedTask, base: PlannedTask) -> dict[str, Any]:
    """What a look needs to know of one call; the ids make a look at other renders another task."""
    return {
        "inputs": call["inputs"], "samples": call["samples"], "stem": ours.stem, "id": ours.id,
        "base_stem": base.stem, "base_id": base.id,
    }  # fmt: skip


def _chunks(calls: Sequence[dict[str, Any]], kept: Sequence[int]) -> list[list[int]]:
    chunks: list[list[int]] = []
    held = CHUNK
    for i in kept:
        if held >= CHUNK:
            chunks.append([])
            held = 0
        chunks[-1].append(i)
        held += calls[i]["samples"]
    return chunks


def _task(made: Plan, stem: str, side: Side, more: dict[str, Any]) -> PlannedTask:
    request = made.request
    payload = {
        "kind": "evaluate", "stem": stem, "model": request.model,
        "model_revision": made.model["revision"], "recipe": side.recipe,
        "recipe_sha256": side.sha256, "threads": request.threads, "dtype": request.dtype,
        "device": request.device, **more,
    }  # fmt: skip
    own = hashlib.sha256(strict_json.canonical(payload).encode()).hexdigest()
    return PlannedTask(own, stem, payload)


# -- what the request names ------------------------------------------------------------------


def _calls(request: Request) -> list[dict[str, Any]]:
    from apps.render.stages import sample_count

    if request.jobs is not None:
        if request.samples is not None or request.steps is not None:
            raise ValueError("evaluate: a job file says how many samples and steps; leave them out")
        jobs = [placed.job for placed in read_jobs(Path(request.jobs))]
        named = [
            job for job in jobs if job.chooses_recipe() or job.model not in (None, request.model)
        ]
        if named:
            raise ValueError(f"{request.jobs}: jobs of an evaluation name no model and no recipe")
        rows = [{"inputs": job.inputs, "seed": job.seed} for job in jobs]
    else:
        rows = _own_calls(request)
    labels = _class_names(request.model)
    for row in rows:
        row["samples"] = sample_count(row["inputs"])
        row["labels"] = [_label(row["inputs"], i, labels) for i in range(row["samples"])]
    if sum(row["samples"] for row in rows) < 2:
        raise ValueError("evaluate: one sample has no interval; wants at least 2")
    return rows


def _own_calls(request: Request) -> list[dict[str, Any]]:
    from apps.digits_referee import STEPS, zoo_inputs
    from apps.render.stages import sample_count

    if not request.model.startswith("zoo:"):
        raise ValueError(f"no calls are known for {request.model}; give some with --jobs FILE")
    samples = request.samples or max(SAMPLES[kind] for kind in request.kinds)
    inputs = zoo_inputs(_pipeline_class(request.model), samples, request.steps or STEPS)
    calls, seed = [], SEED
    for call in inputs:
        calls.append({"inputs": call, "seed": seed})
        seed += sample_count(call)  # the renderer counts up within a call
    return calls


def _judges(request: Request, calls: list[dict[str, Any]]) -> tuple[str | None, bool]:
    """The extractor of `fid`, and whether a judge knows what the calls ask for."""
    from apps.digits_referee import NAME, asked

    zoo = request.model.startswith("zoo:")
    known = zoo and bool(asked([call["inputs"] for call in calls]))
    if "judge" in request.kinds and not known:
        raise ValueError(
            f"evaluate judge: no judge knows what the calls of {request.model} ask for; judges are "
            "for the zoo's classes and captions"
        )
    if "fid" not in request.kinds:
        return None, known
    features = request.features or (f"zoo:{NAME}" if zoo else None)
    if features is None:
        raise ValueError(f"evaluate fid: give --features, such as torchscript:inception.pt, {ELSE}")
    if request.real is None and not zoo:
        raise ValueError(f"evaluate fid: give real pictures with --real FOLDER, {ELSE}")
    return features, known


def _side(recipe: str | None, name: str) -> Side:
    if recipe is None:
        return Side(name, "without a recipe")
    import accel
    from accel.settings import without_paths

    found = accel.read_recipe(recipe)
    methods = tuple(
        without_paths(json.loads(json.dumps(m.to_json()))) for m in found.recipe.methods
    )
    path = str(Path(recipe).resolve())
    return Side(name, found.name, path, found.sha256, methods, found.description)


def _named(recipes: Sequence[str]) -> list[Side]:
    sides: list[Side] = []
    for recipe in recipes:
        name = _SAFE.sub("-", Path(recipe).stem).strip("-")[:60] or "recipe"
        while name.casefold() in {BASELINE, *(s.name.casefold() for s in sides)}:
            name += "-2"
        side = _side(recipe, name)
        twin = next((s for s in sides if s.sha256 == side.sha256), None)
        if twin is not None:
            raise ValueError(f"{recipe}: the same recipe as {twin.recipe}")
        sides.append(side)
    return sides


def _renders(side: Side, calls: list[dict[str, Any]], settings: Settings) -> list[PlannedTask]:
    rows = [
        {
            "name": f"{side.name}-{i:05d}", "seed": call["seed"], "inputs": call["inputs"],
            "recipe": side.recipe,
        }
        for i, call in enumerate(calls)
    ]  # fmt: skip
    placed = [PlacedJob(parse_job(row, {}), row["name"]) for row in rows]
    return plan(placed, settings, Path())


def _pipeline_class(model: str) -> str:
    folder = model_folder(model)
    assert folder is not None, "a zoo model is a folder"
    return json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"]


def _class_names(model: str) -> dict[str, str]:
    folder = model_folder(model)
    if folder is None:
        return {}
    names = json.loads((folder / "model_index.json").read_text("utf-8")).get("id2label")
    return names if isinstance(names, dict) else {}


def _label(inputs: dict[str, Any], sample: int, names: dict[str, str]) -> str:
    """What one sample of a call shows, in words."""
    copies = inputs.get("num_images_per_prompt") or inputs.get("num_videos_per_prompt") or 1
    prompt = inputs.get("prompt")
    if prompt is not None:
        return prompt if isinstance(prompt, str) else prompt[sample // copies]
    labels = inputs.get("class_labels")
    if labels is not None:
        wanted = str(labels[sample // copies])
        return names.get(wanted, f"class {wanted}")
    return f"sample {sample}"
