"""What a results file holds: one strict model for each kind, checked at every write and read.

    python -m benchmarks.schema [KIND]

prints the JSON schema. ``null`` means "not recorded", never zero. Rows of one file must have been
measured under one protocol, on one machine, with one number of threads: speeds and qualities of
others do not compare.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from accel.metrics.protocol import Protocol

REPORT = "report"  # files report_NAME.json: reports of `accel evaluate`
ZOO = "zoo"  # files zoo_NAME.json: written by bench_zoo.py, which has its own content


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _whole_protocol(record: dict[str, Any]) -> dict[str, Any]:
    Protocol.read(record)  # raises ValueError if it was edited
    return record


def _iso_date(text: str) -> str:
    date.fromisoformat(text)
    return text


ProtocolRecord = Annotated[dict[str, Any], AfterValidator(_whole_protocol)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
IsoDate = Annotated[str, AfterValidator(_iso_date)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
Share = Annotated[float, Field(ge=0, le=1)]


class Environment(_Strict):
    """``accel.environment.environment``. load: one-minute average at the start and at the end."""

    hardware: str
    threads: Positive
    versions: dict[str, str]
    commit: str | None
    date: IsoDate
    load: Annotated[list[float | None], Field(min_length=2, max_length=2)] | None = None

    def machine(self) -> tuple[str, int]:
        """What a time depends on."""
        return self.hardware, self.threads


class Interval(_Strict):
    """An estimate with its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if not self.low <= self.high:
            raise ValueError(f"interval from {self.low} to {self.high}")
        return self


class Envelope(BaseModel):
    """What every results file has."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    environment: Environment
    protocol: ProtocolRecord | None = None


class Measured(_Strict):
    """``speedup`` > 1 is faster; a of pairs [a, b] is the side compared with."""

    speedup: Interval
    flops: Pair
    nfe: Pair
    peak_bytes: Pair | None
    psnr: Interval
    ssim: Interval | None
    judged: Judged | None


class Accuracy(_Strict):
    """Share judged right without and with, and the difference paired by sample."""

    before: Interval
    after: Interval
    difference: Interval


class Frechet(_Strict):
    """To real samples without and with; floor: of real samples to others. Equal counts."""

    before: Annotated[float, Field(ge=0)]
    after: Annotated[float, Field(ge=0)]
    floor: Annotated[float, Field(ge=0)]


class Judged(_Strict):
    """A referee's figures."""

    referee: str
    accuracy: Accuracy
    feature_distance: Interval | None
    frechet: Frechet | None


class RecipeMeasured(Measured):
    """The ``measured`` block of a recipe file; ``accel measure`` writes it."""

    model: str
    samples: Positive
    rounds: Positive
    protocol: ProtocolRecord | None
    environment: Environment


class MethodRecord(_Strict):
    method: str
    settings: dict[str, Any]


class PerSample(_Strict):
    """In the order of the inputs, for paired tests between rows."""

    psnr: list[float]
    ssim: list[float] | None = None
    right: list[Share] | None = None
    feature_distance: list[float] | None = None


class Row(Measured):
    """A recipe against the unmodified pipeline. seconds: of each round, [without, with].
    calibration: what an artifact depends on that was made in the run."""

    methods: list[MethodRecord]
    effect: list[Literal["some", "none"]]
    seconds: Annotated[list[list[float]], Field(min_length=2, max_length=2)] | None
    per_sample: PerSample | None
    protocol: Sha256 | None
    environment: Environment
    calibration: dict[str, Any] | None = None


class Study(_Strict):
    """Rows of one model under one protocol on one machine."""

    environment: Environment
    protocol: ProtocolRecord | None
    model: str
    steps: Positive
    guidance: float
    batch: Positive
    samples: Positive
    rows: dict[str, Row]

    @model_validator(mode="after")
    def _rows_compare(self) -> Study:
        own = None if self.protocol is None else self.protocol["sha256"]
        for name, row in self.rows.items():
            if row.protocol != own:
                raise ValueError(f"row {name!r} is of another protocol than the file")
            if row.environment.machine() != self.environment.machine():
                raise ValueError(
                    f"row {name!r} is of {row.environment.machine()}, the file of "
                    f"{self.environment.machine()}: measure all rows on one machine"
                )
        return self


class Native(Study):
    """``native.json``: single methods, combinations, peers and controls."""


class PeersRow(Row):
    """whose: the project whose code does it; "recipe": several of them; "control": none."""

    whose: Literal["ours", "diffusers", "recipe", "cache-dit", "torchao", "quanto", "control"]


class Peers(Study):
    """``peers.json``: every method in turn, recipes, peers and controls under one protocol.
    left_out: rows that cannot be measured, with the reason; waiting: those not measured yet."""

    left_out: dict[str, str]
    waiting: list[str]
    rows: dict[str, PeersRow]  # type: ignore[assignment]  # pydantic fields are covariant here


class Caches(Study):
    """``caches.json`` (50 steps), ``caches_20.json``, ``caches_sd.json``, ``caches_wan.json``:
    settings of each cache, from careful to bold; a row's name begins with its curve."""


class KernelRow(Row):
    """kernels: operators that attended, as counted in a run's first denoiser call."""

    kernels: list[str]


class AttentionKernels(Study):
    """``attention_backend.json``: kernels of dense attention; refused: what does not work there."""

    rows: dict[str, KernelRow]  # type: ignore[assignment]  # pydantic fields are covariant here
    refused: dict[str, str]


class Students(Study):
    """``tdm.json`` and, of other models, ``tdm_sd.json`` and ``tdm_wan.json``: distilled students,
    and their teacher in as few steps."""


class Leaps(Study):
    """``leap.json``: leaps, and as many steps without."""


class Tunings(Study):
    """``rlg.json``: guidance by a tuned model, without guidance by the prompt."""


class Bar(Row):
    """One more method. over_previous: speed-up over the bar before, timed in turn with it."""

    over_previous: Interval | None


class Waterfall(Study):
    """``waterfall.json``: each row adds a method to the one before; a control comes last."""

    rows: dict[str, Bar]  # type: ignore[assignment]  # pydantic fields are covariant here


class WrappedCall(_Strict):
    """Microseconds of one call more than of a bare one, by number of layers."""

    one: float = Field(alias="1_layers")
    three: float = Field(alias="3_layers")


class OverheadRow(_Strict):
    overhead_percent: float
    low: float
    high: float
    wrapped_calls_per_step: Count
    counted_percent: Annotated[float, Field(ge=0)]
    bare_seconds_per_step: Annotated[float, Field(gt=0)]


class Overhead(_Strict):
    """``overhead.json``."""

    environment: Environment
    protocol: ProtocolRecord | None
    microseconds_per_wrapped_call: WrappedCall
    dit_xl_256: dict[str, OverheadRow]


class Kill(_Strict):
    """``kill.json``."""

    environment: Environment
    protocol: ProtocolRecord | None
    what: str
    tried: Positive
    survived: Count
    renders: Positive
    jobs_per_render: Positive
    workers: list[Positive]
    last_event_before_kill: dict[str, Count]
    problems: list[str]

    @model_validator(mode="after")
    def _kills_add_up(self) -> Kill:
        if self.survived > self.tried or sum(self.last_event_before_kill.values()) != self.tried:
            raise ValueError(f"{self.survived} of {self.tried} survived, or moments are missing")
        return self


class Robustness(_Strict):
    """``robustness.json``: "right", "wrong" or the name of an error, by cache and scenario."""

    environment: Environment
    protocol: ProtocolRecord | None
    rows: dict[str, dict[str, str]]


class SpeedRow(_Strict):
    """One method on one model: time, and operations [without, with]."""

    speedup: Interval
    flops: Pair
    environment: Environment | None = None  # the file's


class SpeedModel(_Strict):
    blocks: Positive
    size: str | None = None  # blocks, type, samples; older results have none
    rows: dict[str, SpeedRow]


class CacheSpeed(_Strict):
    """``cache_speed.json``."""

    environment: Environment
    protocol: ProtocolRecord
    models: dict[str, SpeedModel]


class DrawsRow(_Strict):
    """Frechet distances of one sampler's draws. calls: of the network for one sample."""

    sampler: str
    steps: Positive
    setting: str
    methods: list[MethodRecord]
    calls: Positive
    samples: Positive
    seeds: list[Count]
    frechet: list[Annotated[float, Field(ge=0)]]
    environment: Environment | None = None  # the file's

    @model_validator(mode="after")
    def _a_distance_for_each_seed(self) -> DrawsRow:
        if len(self.seeds) != len(self.frechet):
            raise ValueError(f"{len(self.frechet)} distances of {len(self.seeds)} sets")
        return self


class ExposureRow(_Strict):
    """Of one call of the network; pairs are [noised real pictures, samples on their way]."""

    time: Count
    error: Annotated[float, Field(ge=0)]
    rms: Annotated[list[float], Field(min_length=2, max_length=2)]
    variance: Annotated[list[float], Field(min_length=2, max_length=2)]


class TimeShiftStudy(_Strict):
    """``time_shift.json``. overhead: seconds with over seconds without."""

    environment: Environment
    protocol: ProtocolRecord
    model: str
    clean_variance: Annotated[float, Field(gt=0)]
    rows: list[DrawsRow]
    exposure: dict[str, list[ExposureRow]]  # by sampler
    overhead: Interval


class Brightness(_Strict):
    """Of backgrounds, 0 to 1. black_or_white: share nearest to one of them."""

    mean: Share
    deviation: Share
    black_or_white: Share


class BrightnessRow(_Strict):
    """named_right: by attribute, where the prompt names the background. The rest: where not.

    Distances: Wasserstein-1 to real pictures, of whole pictures' means (0..255) and of backgrounds.
    """

    setting: str
    steps: Positive
    methods: list[MethodRecord]
    named_right: dict[str, Share]
    brightness: Brightness
    image_mean_distance: Annotated[float, Field(ge=0)]
    background_distance: Annotated[float, Field(ge=0)]
    frechet: Annotated[float, Field(ge=0)]


class RealBrightness(_Strict):
    brightness: Brightness
    named_right: dict[str, Share]


class OneMoreStepStudy(_Strict):
    """``one_more_step.json``. overhead: seconds with over seconds without."""

    environment: Environment
    protocol: ProtocolRecord
    model: str
    samples: Positive
    rows: list[BrightnessRow]
    real: RealBrightness
    overhead: Interval


class RemovedWeights(_Strict):
    """What goes out and what comes instead, with one thing held fixed."""

    modules: Count
    parameters: Count
    weights_bytes: Count
    table_bytes: Count


class TemporalCounts(_Strict):
    """Of one architecture, by what is held fixed beside the sample's own dependence."""

    parameters: Positive
    timestep: RemovedWeights
    pooled: RemovedWeights
    text: RemovedWeights


class TemporalCountsFile(_Strict):
    """``temporal_counts.json``: in bfloat16 over ``grid`` steps; bit_equal: by tiny pipeline."""

    environment: Environment
    grid: Positive
    counts: dict[str, TemporalCounts]
    bit_equal: dict[str, bool]


class TemporalTimes(_Strict):
    """``temporal_times.json``: by when the table was filled."""

    environment: Environment
    model: str
    steps: Positive
    speedup: dict[str, Interval]


class TemporalCacheStudy(Study):
    """``temporal_cache.json``."""


class QuantFacts(_Strict):
    """bytes_on_disk: of the model's weights without, and with what stays whole beside the artifact.
    temporal_error: relative, of what depends on the timestep, by its weights alone. fallbacks:
    calls of layers or of the whole model, in the last run, that were computed as they are."""

    calibration_seconds: Annotated[float, Field(ge=0)] | None = None
    temporal_error: Annotated[float, Field(ge=0)] | None = None
    quantised_layers: Count | None = None
    layers_by_bits: dict[str, Count] | None = None
    fallbacks: Count | None = None
    bytes_on_disk: Pair | None = None
    weights_bytes: Count | None = None
    quantised_bytes: Count | None = None


class QuantRow(Row):
    facts: QuantFacts


class QuantStudy(Study):
    """``quant.json`` (digits-dit), ``quant_sd.json``, ``quant_ddpm.json``."""

    rows: dict[str, QuantRow]  # type: ignore[assignment]  # pydantic fields are covariant here
    guidance: float | None  # type: ignore[assignment]  # a model without a question has none


Seconds = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


class SparseAttentionRow(_Strict):
    """Attention alone. seconds: of every round, by what was timed in turn; "ours" selects and
    attends, "kernel" attends, "flex" attends over the same blocks. executed: density, counted."""

    tokens: Positive
    head_dim: Positive
    heads: Positive
    blocks: Pair
    dtype: str
    density: Share
    executed: Share
    fastest_dense: str
    seconds: dict[str, Seconds]
    speedup: Interval
    speedup_pooled: Interval
    over_flex: Interval
    most_over_flex: Interval
    selection_share: Share


class SparseModelRow(_Strict):
    """Whole blocks of a model of random weights. seconds: [dense, sparse] of every round."""

    tokens: Positive
    layers: Positive
    blocks: Pair
    density: Share
    executed: Share
    fallbacks: dict[str, Count]
    seconds: Annotated[list[Seconds], Field(min_length=2, max_length=2)]
    speedup: Interval


class SparseSpeed(_Strict):
    """``sparse.json``: no quality in it, weights and data are random."""

    environment: Environment
    protocol: ProtocolRecord | None
    rounds: Positive
    attention: list[SparseAttentionRow]
    model: list[SparseModelRow]


class SearchFigure(_Strict):
    """Nines of certainty of an algorithm and of random search at its cost; paired by prompt."""

    nines: Interval
    random: Interval
    over_random: Interval
    p: Share


class SearchPoint(_Strict):
    prompts: Positive
    judge: SearchFigure
    referee: SearchFigure


class DraftPoint(SearchPoint):
    """renders: mean cost of drafts and commit."""

    renders: Annotated[float, Field(gt=0)]


class SearchRow(_Strict):
    """at: by cost in renders. methods: of the recipe that candidates or drafts are made with."""

    search: dict[str, Any]
    methods: list[MethodRecord]
    at: dict[str, SearchPoint]
    verified_per_evaluation: Annotated[float, Field(ge=0)]
    decodes_per_evaluation: Annotated[float, Field(ge=0)]


class DraftRow(_Strict):
    """captured: share of best-of-N's gain; price: of a draft in renders; cost: of drafts and commit
    in best-of-N's; at_8: more drafts, for the cost of 8 renders."""

    methods: list[MethodRecord]
    rank: Interval
    top: Interval
    captured: Interval
    price: Annotated[float, Field(gt=0)]
    cost: Annotated[float, Field(gt=0)]
    inputs: Positive
    candidates: Positive
    at_own_cost: DraftPoint
    at_8: DraftPoint | None


class SearchKill(_Strict):
    search: str
    killed_at: list[float]
    same: bool
    scored_twice: int


class SearchKills(_Strict):
    tried: Positive
    killed: Count
    same: Count
    batch: Positive
    most_scored_twice: int
    rows: list[SearchKill]
    environment: Environment | None = None  # the file's


class CorrectorsFigure(_Strict):
    """Mean nines of a whole population."""

    weighed: Interval
    unweighed: Interval
    difference: Interval


class CorrectorsRow(_Strict):
    """ancestors, effective: of 8 particles. spread: of a step's log-weights before the clamp."""

    prompts: Positive
    judge: CorrectorsFigure
    referee: CorrectorsFigure
    ancestors: Annotated[float, Field(gt=0)]
    spread: Annotated[float, Field(ge=0)]
    effective: Annotated[float, Field(gt=0)]


Both = Annotated[list[float], Field(min_length=2, max_length=2)]  # log-likelihoods
Committed = Annotated[list[float], Field(min_length=3, max_length=3)]  # and evaluations


class PoolOfPrompt(_Strict):
    scores: Annotated[list[Both], Field(min_length=1)]
    evaluations: Positive


class AlgorithmOnPrompt(_Strict):
    at: dict[str, Both]
    evaluations: Positive
    decodes: Count
    verified: Count


class AlgorithmRows(_Strict):
    """environment: of what was added last; ``None``: the file's."""

    search: dict[str, Any]
    methods: list[MethodRecord]
    rows: dict[str, AlgorithmOnPrompt]
    environment: Environment | None = None


class DraftOnPrompt(_Strict):
    drafts: list[float]
    draft_evaluations: Positive
    own: Committed
    at_8: Committed | None = None


class DraftRows(_Strict):
    methods: list[MethodRecord]
    rows: dict[str, DraftOnPrompt]
    environment: Environment | None = None  # as of AlgorithmRows


class CorrectorsOnPrompt(_Strict):
    scores: list[Both]
    ancestors: Positive
    spread: float
    effective: float


class SearchRows(_Strict):
    """``search_rows.json``: what each prompt gave, log-likelihoods by judge and referee."""

    environment: Environment
    protocol: ProtocolRecord
    model: str
    prompts: list[str]
    random: dict[str, PoolOfPrompt]
    algorithms: dict[str, AlgorithmRows]
    drafts: dict[str, DraftRows]
    correctors: dict[str, dict[str, CorrectorsOnPrompt]] = {}


class SearchStudy(_Strict):
    """``search.json``. price: evaluations of a render."""

    environment: Environment
    protocol: ProtocolRecord
    model: str
    prompts: Positive
    price: Annotated[float, Field(gt=0)]
    random: dict[str, dict[str, Interval]]
    algorithms: dict[str, SearchRow]
    drafts: dict[str, DraftRow]
    correctors: CorrectorsRow | None
    kills: SearchKills | None


class AgreementRow(_Strict):
    """One figure, ours and another's of the same data. relative: |ours - theirs| / |theirs|."""

    figure: str
    of: str
    ours: float
    theirs: float
    relative: Annotated[float, Field(ge=0)]


class CostRow(_Strict):
    """Frechet distance of two sets. peak_mb: resident memory beyond the imports."""

    how: Literal["streamed", "at_once"]
    features: Positive
    cpu_seconds: Annotated[float, Field(ge=0)]
    peak_mb: Annotated[float, Field(ge=0)]
    frechet: float


class WholeEvaluation(_Strict):
    model: str
    samples: Positive
    rounds: Count
    seconds: Annotated[float, Field(gt=0)]
    cpu_seconds: Annotated[float, Field(gt=0)]
    page_kb: Positive


class Evaluation(_Strict):
    """``evaluate.json``: the evaluation's own agreement with others, and its cost."""

    environment: Environment
    protocol: ProtocolRecord | None
    agreement: list[AgreementRow]
    samples: Positive
    costs: list[CostRow]
    whole: WholeEvaluation


class Violation(_Strict):
    """A rule of axe that does not hold, and where."""

    impact: Literal["minor", "moderate", "serious", "critical"]
    help: str
    elements: Annotated[list[str], Field(min_length=1)]


class PageRow(_Strict):
    """One view of the app. undecided: rules that only a person can decide."""

    tab: str
    scheme: Literal["light", "dark"]
    size: str
    holds: Positive
    undecided: list[str]
    violations: dict[str, Violation]


class Page(_Strict):
    """``page.json``: the app's page under axe."""

    environment: Environment
    protocol: ProtocolRecord | None
    rows: Annotated[list[PageRow], Field(min_length=1)]


class ReportRow(BaseModel):
    """One recipe of a report of `accel evaluate`, without its values of each sample."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    label: str
    recipe: str
    sha256: Sha256
    speedup: Interval
    figures: dict[str, dict[str, Any]]
    worst: list[dict[str, Any]]


class Report(BaseModel):
    """``report_MODEL.json``: a report of `accel evaluate`; cards of recipes are made from it."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    environment: dict[str, Any]
    protocol: ProtocolRecord
    kinds: list[str]
    samples: Positive
    recipes: list[ReportRow]
    warnings: list[str]


class QuantOnGPU(_Strict):
    """One part. milliseconds: of bfloat16 and this. errors: of outputs, relative; failed:
    why, by row and kernel. search: compiled with the settings that torchao recommends."""

    search: bool
    speedups: dict[str, dict[str, Interval]]
    milliseconds: dict[str, dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]]]
    errors: dict[str, dict[str, float]]
    failed: dict[str, str]


class QuantKernels(_Strict):
    """``quant_kernels.json``: speed-ups over the floating-point layer, by layer and kernel."""

    environment: Environment
    layers: dict[str, dict[str, Interval]] = {}
    dit_xl_256: dict[str, Interval] = {}
    gpu: dict[Literal["layers", "flux", "wan"], QuantOnGPU] = {}


class SparseQualityRow(_Strict):
    """A policy against dense attention. density: counted in the last video. expected: PSNR that its
    calibration foretold, dB; expected_extremes: of its inputs that lose most and least."""

    methods: list[MethodRecord]
    density: Share
    psnr: Interval
    per_video: list[float]
    output_error: Annotated[float, Field(ge=0)]
    fallbacks: dict[str, Count]
    expected: float | None = None
    expected_extremes: tuple[float, float] | None = None


class SparseVerdict(_Strict):
    videos: Positive
    psnr: Interval
    judged: Judged


class SparseQuality(_Strict):
    """``sparse_quality.json``: rows are called POLICY @ DENSITY asked for."""

    environment: Environment
    protocol: ProtocolRecord
    model: str
    steps: Positive
    guidance: float
    videos: Positive
    rows: dict[str, SparseQualityRow]
    judged: dict[str, SparseVerdict]


KINDS: dict[str, type[BaseModel]] = {
    "sparse_quality": SparseQuality,
    "sparse": SparseSpeed,
    "attention_backend": AttentionKernels,
    "evaluate": Evaluation,
    "page": Page,
    "native": Native,
    "peers": Peers,
    "caches": Caches,
    "caches_20": Caches,
    "caches_sd": Caches,
    "caches_wan": Caches,
    "cache_speed": CacheSpeed,
    "robustness": Robustness,
    "tdm": Students,
    "tdm_sd": Students,
    "tdm_wan": Students,
    "leap": Leaps,
    "rlg": Tunings,
    "waterfall": Waterfall,
    "overhead": Overhead,
    "quant": QuantStudy,
    "quant_sd": QuantStudy,
    "quant_ddpm": QuantStudy,
    "quant_kernels": QuantKernels,
    "temporal_cache": TemporalCacheStudy,
    "temporal_counts": TemporalCountsFile,
    "temporal_times": TemporalTimes,
    "kill": Kill,
    "time_shift": TimeShiftStudy,
    "one_more_step": OneMoreStepStudy,
    "recipe": RecipeMeasured,
    "search": SearchStudy,
    "search_wan": SearchStudy,
    "search_rows": SearchRows,
    "search_wan_rows": SearchRows,
    ZOO: Envelope,
    REPORT: Report,
}


def kind_of(name: str) -> str:
    """The kind of a results file by its name. Raises ``ValueError`` for an unknown one."""
    many = name.partition("_")[0]
    kind = many if many in (ZOO, REPORT) else name
    if kind not in KINDS:
        raise ValueError(f"no kind of results is called {name!r}; known: {', '.join(KINDS)}")
    return kind


def checked(name: str, text: str) -> dict[str, Any]:
    """The content of a results file. Raises ``ValueError`` naming every field that is wrong."""
    KINDS[kind_of(name)].model_validate_json(text)
    return json.loads(text)


def json_schema(name: str) -> dict[str, Any]:
    """JSON schema of one kind of results file."""
    return TypeAdapter(KINDS[kind_of(name)]).json_schema()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("kind", nargs="?", choices=list(KINDS), default="native")
    print(json.dumps(json_schema(parser.parse_args().kind), indent=2))


if __name__ == "__main__":
    main()
