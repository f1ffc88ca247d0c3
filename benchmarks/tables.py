"""Everything that is generated from results: the method index and the figures in README.md.

    python -m benchmarks.tables [--check]

Writes ``methods.json`` into each package of methods, the cards of the zoo, and the blocks of
``PAGES`` between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``--check`` only says what is
out of date. A method without a measured row is not listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accel import zoo
from accel.method import Method, Recipe
from accel.methods import INDEX_FILE, packages
from benchmarks import (
    bench_page,
    cache_tables,
    quant_tables,
    recipe_cards,
    sampler_tables,
    search_tables,
    sparse_tables,
    zoo_card,
)
from benchmarks.digits_study import weights_sha256
from benchmarks.results_file import DEVICES, path
from benchmarks.results_file import read as read_file
from benchmarks.sampler_tables import measured_by_distance, of_time_shift
from benchmarks.spans import span
from benchmarks.waterfall_picture import PICTURE, drawn_from

ROOT = Path(__file__).resolve().parents[1]
OWN = ("samplers", "caches", "quant", "sparse_attn")
RESULTS_WITH_METHODS = (
    *("native", "caches", "caches_20", "caches_sd", "leap", "rlg", "temporal_cache", "quant"),
    "caches_wan",
    "attention_backend",
    "peers",
)
PEERS = "benchmarks.peers:"
# no better than something simpler, the second row beside their own in one study: no row in README
BELOW = {
    "caches.router:RouterCache": ("caches", "router: 42% reused", "FORA: 2"),
    "caches.token_density:TokenDensity": (
        "caches",
        "token density, drawn: first 25% of the steps",
        "control: tokens drawn anywhere, first 25% of the steps",
    ),
    "caches.token_merge:TokenMerge": (
        "caches_wan",
        "token merge: first 50% of the steps",
        "control: 12 steps",
    ),
    "samplers.leap:Leap": ("leap", "Leap(0.20)", "control: 6 steps"),
    "samplers.rlg:RLG": ("rlg", "RLG(1.6)", "control: the tuning's weights times 1.6"),
    "samplers.time_shift:TimeShift": ("time_shift", "time-shift", "constant"),
}


def read(name: str, device: str = "cpu") -> dict[str, Any] | None:
    """A result; parsed once, as every method looks for its row in many. Not to be changed."""
    file = path(name, device)
    return _parsed(name, device, file, file.stat().st_mtime_ns) if file.is_file() else None


@functools.lru_cache(maxsize=64)
def _parsed(name: str, device: str, file: Path, written: int) -> dict[str, Any] | None:
    return read_file(name, device)


def method_classes(package: str) -> list[type[Method]]:
    """Public method classes in the public modules of a package, by name."""
    found = []
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        for name, cls in vars(importlib.import_module(info.name)).items():
            own = inspect.isclass(cls) and cls.__module__ == info.name
            if own and issubclass(cls, Method) and cls is not Recipe and not name.startswith("_"):
                found.append(cls)
    return sorted(found, key=lambda cls: cls.name())


FIGURES = ("speedup", "flops", "nfe", "psnr", "ssim", "judged")


def measured_row(cls: type[Method]) -> dict[str, Any] | None:
    """The first measured row that holds this method alone, with its conditions."""
    for name in RESULTS_WITH_METHODS:
        result = read(name) or {}
        for label, row in result.get("rows", {}).items():
            alone = [m["method"] for m in row["methods"]] == [cls.name()]
            if alone and not label.startswith("control"):
                return {
                    "study": name,
                    "setting": label,
                    "model": result["model"],
                    "hardware": row["environment"]["hardware"],
                    "threads": row["environment"]["threads"],
                    "protocol": row["protocol"],
                    **{k: row[k] for k in FIGURES},
                }
    return measured_by_distance(cls.name()) or sparse_tables.measured_by_psnr(cls.name())


def index_rows(package: str) -> list[dict[str, Any]]:
    """``methods.json`` of one package."""
    rows = []
    for cls in method_classes(package):
        measured = measured_row(cls)
        if measured is not None:
            rows.append(
                {
                    "name": cls.name(),
                    "summary": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
                    "paper": cls.PAPER,
                    "slots": sorted(cls.SLOTS),
                    "fields": [f.name for f in dataclasses.fields(cls)],
                    "measured": measured,
                }
            )
    return rows


# -- README ----------------------------------------------------------------------------------


def _interval(value: dict[str, float] | None, form: str, unit: str) -> str:
    if value is None:
        return "-"
    return span(value, form, unit)


QUALITY = "speed-up | work | PSNR | SSIM | judged right | Frechet |"
RULE = "---|" * QUALITY.count("|")


PEERS_OPERATORS = ("benchmarks.quant_peers:TorchAO", "benchmarks.quant_peers:Quanto")


def _quality(row: dict[str, Any]) -> str:
    """The cells under ``QUALITY``. Work in operators of others is not counted, so not shown."""
    flops = row.get("flops")
    if any(m["method"] in PEERS_OPERATORS for m in row.get("methods", [])):
        flops = None
    cells = [
        _interval(row["speedup"], "{:.2f}", "x"),
        "-" if flops is None else f"{flops[1] / flops[0]:.2f}",
        _interval(row.get("psnr"), "{:.1f}", " dB"),
        _interval(row.get("ssim"), "{:.3f}", ""),
    ]
    judged, distances = row.get("judged"), row.get("frechet")
    if judged is None:
        return " | ".join([*cells, "-", f"{_moved(distances) if distances else '-'} |"])
    points = {k: 100 * v for k, v in judged["accuracy"]["difference"].items()}
    share = 100 * judged["accuracy"]["after"]["estimate"]
    right = f"{share:.1f} % ({points['low']:+.1f} to {points['high']:+.1f})"
    distance = f"{judged['frechet']['after']:.2f}" if judged["frechet"] else "-"
    return " | ".join([*cells, right, f"{distance} |"])


def _moved(distances: dict[str, float]) -> str:
    return f"{distances['before']:.2f} → {distances['after']:.2f}"


def _methods() -> str:
    lines = [f"| method | slots | source | setting | {QUALITY}", f"|---|---|---|---|{RULE}"]
    rows = [row for package in OWN for row in index_rows(package)]
    below = [row for row in rows if row["name"] in BELOW]
    rows, other_policies = sparse_tables.best_policy([row for row in rows if row not in below])
    for row in rows:
        m = row["measured"]
        setting = f"{m['setting']} ({m['study']})"
        what = f"`{row['name']}` | {', '.join(row['slots'])} | {row['paper']} | {setting}"
        lines.append(f"| {what} | {_quality(m)}")
    where = "; ".join(conditions([row["measured"] for row in rows]))
    controlled = "; ".join(f"`{row['name']}`: {_beside(row['name'])}" for row in below)
    controlled = f" No better than what is simpler: {controlled}."
    return "\n".join([*lines, "", f"{_CAPTION} Studies: {where}.{other_policies}{controlled}"])


def _beside(name: str) -> str:
    study, *labels = BELOW[name]
    if study == "time_shift":
        return f"{' beside '.join(map(_shifted, labels))} ({study})"
    rows = [(read(study) or {})["rows"][label] for label in labels]
    figures = [
        f"{label} {row['speedup']['estimate']:.2f}x at {row['psnr']['estimate']:.1f} dB"
        for label, row in zip(labels, rows, strict=True)
    ]
    return f"{' beside '.join(figures)} ({study})"


def _shifted(setting: str) -> str:
    row = of_time_shift(setting)
    assert row is not None
    return f"{row['setting']} Frechet {_moved(row['frechet'])}"


_CAPTION = (
    "Speed-up: median of paired runs with a 95 % bootstrap interval. Work: floating-point "
    "operations relative to the unmodified pipeline. PSNR, SSIM: against the unmodified pipeline's "
    "output for the same seeds, mean with interval, 100 dB where equal; toy models, no claim about "
    "others. Judged "
    "right: share with what was asked, by the referee (paired interval of the change in points). "
    "Frechet: to real samples at equal counts (→: from without to with). Rows compare within one "
    "study (in brackets)."
)


def _baseline(judged: dict[str, Any]) -> str:
    """What the unmodified pipeline scores, and what "judged right" means."""
    before = 100 * judged["accuracy"]["before"]["estimate"]
    text = (
        f" Judged right: share with what was asked, by `{judged['referee']}` (paired interval of "
        f"the change in points); unmodified {before:.1f} %."
    )
    if (distances := judged["frechet"]) is not None:
        text += (
            f" Frechet: to real samples at equal counts; unmodified {distances['before']:.2f}, "
            f"other real samples {distances['floor']:.2f}."
        )
    return text


def conditions(rows: list[dict[str, Any]]) -> list[str]:
    """What each study was measured on, and what is right there without any method.

    Raises:
        ValueError: rows of one study that do not compare.
    """
    found: dict[str, tuple[Any, ...]] = {}
    said: dict[str, str] = {}
    for row in rows:
        study = row["study"]
        own = tuple(row[k] for k in ("model", "hardware", "threads", "protocol"))
        if found.setdefault(study, own) != own:
            raise ValueError(
                f"rows of {study} were measured as {own} and as {found[study]}; "
                "one study wants one machine, one number of threads and one protocol"
            )
        model, hardware, threads, _ = own
        text = f"{study} on {model}, {hardware}, {threads} thread(s)"
        if earlier_weights((read(study) or {}).get("protocol") or {}):
            text += ", with earlier weights"
        judged = row.get("judged")
        if judged:
            before = 100 * judged["accuracy"]["before"]["estimate"]
            text += f", unmodified {before:.1f} % right"
            if (distances := judged["frechet"]) is not None:
                text += f", Frechet {distances['before']:.2f} (real: {distances['floor']:.2f})"
        said.setdefault(study, text)
    return list(said.values())


def earlier_weights(protocol: dict[str, Any]) -> str:
    """The model of the zoo that has been trained on since this was measured; "" if it has not."""
    model = protocol.get("model")
    if not isinstance(model, dict) or "weights_sha256" not in model:
        return ""
    name = model["name"].removeprefix("zoo:")
    there = name in zoo.names() and weights_sha256(zoo.path(name)) != model["weights_sha256"]
    return model["name"] if there else ""


def _every_device(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    """``table`` of each device's result, the CPU's first."""
    said = []
    for result in (read(name, device) for device in DEVICES):
        if result is not None:
            said.append(table(result))
            if before := earlier_weights(result.get("protocol") or {}):
                said.append(f"Measured before {before} was trained further: with earlier weights.")
    return "\n\n".join(said) or "Not measured yet."


def _beside_on(result: dict[str, Any]) -> str:
    """Combinations, peers and controls; single settings that are not above stay in the file."""
    env = result["environment"]
    where = f"{result['model']}, {env['hardware']}, {env['threads']} thread(s)"
    lines = [
        "Combinations, peers, and controls that do the same work without what the method adds "
        f"({where}, batches of {result['batch']}, {result['steps']} steps asked):",
        "",
        f"| what is on | {QUALITY}",
        f"|---|{RULE}",
    ]
    for label, row in result["rows"].items():
        names = [m["method"] for m in row["methods"]]
        if len(names) > 1 or label.startswith("control") or names[0].startswith(PEERS):
            lines.append(f"| {label} | {_quality(row)}")
    return "\n".join(lines)


def _rows_on(result: dict[str, Any], said: str) -> str:
    """Every row of a study under a sentence."""
    env = result["environment"]
    where = f"{result['model']}, {env['hardware']}, {env['threads']} thread(s)"
    lines = [f"{said} ({where}, {result['samples']} samples):", "", f"| what is on | {QUALITY}"]
    lines.append(f"|---|{RULE}")
    lines += [f"| {label} | {_quality(row)}" for label, row in result["rows"].items()]
    judged = next((r["judged"] for r in result["rows"].values() if r["judged"]), None)
    return "\n".join([*lines, "", _baseline(judged).strip() if judged else ""]).rstrip()


def _students_on(result: dict[str, Any]) -> str:
    return _rows_on(
        result,
        f"Distilled students against their teacher's {result['steps']} steps with guidance "
        f"{result['guidance']:g}; the controls are the teacher in as few",
    )


def _leaps_on(result: dict[str, Any]) -> str:
    return _rows_on(
        result,
        f"Leaps against all {result['steps']} Euler steps; the controls take as many steps evenly",
    )


def _tunings_on(result: dict[str, Any]) -> str:
    return _rows_on(
        result,
        f"Guidance by what a tuning to the judge has changed, {result['steps']} steps without "
        "guidance by the prompt; the number is the weight, 1 the tuned model itself",
    )


def _caches_on(result: dict[str, Any]) -> str:
    said = f"Every setting, {result['steps']} steps asked"
    return f"{cache_tables.matched(result)}\n\n{_rows_on(result, said)}"


def _quant_on(result: dict[str, Any]) -> str:
    said = (
        "Weights and activations in fewer bits, beside peers; the controls have their scales "
        f"shuffled; {result['steps']} steps"
    )
    return quant_tables.study(result, _rows_on(result, said))


def _waterfall_on(result: dict[str, Any]) -> str:
    bars = [f"{k} {r['speedup']['estimate']:.2f}x" for k, r in result["rows"].items()]
    device = "cpu" if result == read("waterfall") else "cuda"
    picture = PICTURE[device]
    text = f"speed-up and quality: unmodified 1.00x, {', '.join(bars)}"
    return f"![{text}]({picture.parent.name}/{picture.name})"


def _peers_on(result: dict[str, Any]) -> str:
    """Every method, recipe, peer and control of one study, the fastest of each group first."""
    env, rows = result["environment"], result["rows"]
    where = f"{result['model']}, {env['hardware']}, {env['threads']} thread(s)"
    lines = [
        f"{where}, {result['samples']} samples in batches of {result['batch']}, "
        f"{result['steps']} steps asked:",
        "",
        f"| whose | what is on | {QUALITY}",
        f"|---|---|{RULE}",
    ]
    for group in (
        ("recipe",),
        ("ours", "diffusers"),
        ("cache-dit", "torchao", "quanto"),
        ("control",),
    ):
        found = [(name, r) for name, r in rows.items() if r["whose"] in group]
        for name, r in sorted(found, key=lambda one: -one[1]["speedup"]["estimate"]):
            lines.append(f"| {r['whose']} | {name} | {_quality(r)}")
    judged = next((r["judged"] for r in rows.values() if r["judged"]), None)
    there = {m["method"] for r in rows.values() for m in r["methods"]}
    listed = [row["name"] for package in OWN for row in index_rows(package)]
    missing = ", ".join(name.partition(":")[2] for name in listed if name not in there)
    said = f"Measured elsewhere, on what they are for: {missing}." if missing else ""
    out = "; ".join(f"{name} ({reason})" for name, reason in result["left_out"].items())
    said += f" Left out here: {out}." if out else ""
    if result["waiting"]:
        said += f" Not measured yet: {'; '.join(result['waiting'])}."
    parts = ["\n".join(lines), _baseline(judged).strip() if judged else "", said.strip()]
    return "\n\n".join(part for part in parts if part)


def _overhead_on(result: dict[str, Any]) -> str:
    per_call, env = result["microseconds_per_wrapped_call"], result["environment"]
    where = f"{env['hardware']}, {env['threads']} threads"
    lines = [
        f"A wrapped call costs {per_call['1_layers']:.2f} µs more than a bare one "
        f"({per_call['3_layers']:.2f} µs with three layers). Share of a DiT-XL/2-shaped step at "
        f"256 pixels ({where}, random weights):",
        "",
        "| attached | wrapped calls a step | their cost by count | overhead, paired |",
        "|---|---|---|---|",
    ]
    for name, row in result["dit_xl_256"].items():
        between = f"{row['low']:.2f} to {row['high']:.2f}"
        counted = f"{row['wrapped_calls_per_step']} | {row['counted_percent']:.3f} %"
        lines.append(f"| {name} | {counted} | {row['overhead_percent']:.1f} % ({between}) |")
    return "\n".join(lines)


def _kills() -> str:
    result = read("kill")
    if result is None:
        return "Not measured yet."
    return (
        f"Killed with `kill -9` at {result['tried']} random moments and resumed: "
        f"{result['survived']} of {result['tried']} times every job was done exactly once, with no "
        "partial file and a consistent ledger (`benchmarks/bench_kill.py`)."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": _methods,
    "waterfall": lambda: _every_device("waterfall", _waterfall_on),
    "peers": lambda: _every_device("peers", _peers_on),
    "beside": lambda: _every_device("native", _beside_on),
    "overhead": lambda: _every_device("overhead", _overhead_on),
    "kills": _kills,
    "students": lambda: _every_device("tdm", _students_on),
    "students_sd": lambda: _every_device("tdm_sd", _students_on),
    "students_wan": lambda: _every_device("tdm_wan", _students_on),
    "time_shift": lambda: _every_device("time_shift", sampler_tables.time_shift),
    "one_more_step": lambda: _every_device("one_more_step", sampler_tables.one_more_step),
    "caches": lambda: _every_device("caches", _caches_on),
    "caches_20": lambda: _every_device("caches_20", _caches_on),
    "caches_sd": lambda: _every_device("caches_sd", _caches_on),
    "search": lambda: _every_device("search", search_tables.search),
    "search_wan": lambda: _every_device("search_wan", search_tables.search),
    "caches_wan": lambda: _every_device("caches_wan", _caches_on),
    "cache_speed": lambda: _every_device("cache_speed", cache_tables.speed),
    "robustness": lambda: _every_device("robustness", cache_tables.robustness),
    "quant": lambda: _every_device("quant", _quant_on),
    "quant_sd": lambda: _every_device("quant_sd", _quant_on),
    "quant_ddpm": lambda: _every_device("quant_ddpm", _quant_on),
    "quant_kernels": lambda: _every_device("quant_kernels", quant_tables.kernels),
    "temporal_counts": lambda: _every_device("temporal_counts", quant_tables.temporal_counts),
    "temporal_times": lambda: _every_device("temporal_times", quant_tables.temporal_times),
    "sparse": lambda: _every_device("sparse", sparse_tables.speed),
    "attention_backend": lambda: _every_device("attention_backend", sparse_tables.backends),
    "sparse_quality": lambda: _every_device("sparse_quality", sparse_tables.quality),
    "rlg": lambda: _every_device("rlg", _tunings_on),
    "leap": lambda: _every_device("leap", _leaps_on),
    "evaluate": lambda: _every_device("evaluate", recipe_cards.evaluation),
    "page": lambda: _every_device("page", bench_page.table),
    "recipe_cards": recipe_cards.cards,
}
PAGES = ("README.md", "benchmarks/README.md", "recipes/README.md")


_BEGIN, _END = re.compile(r"<!-- generated: (\w+) -->"), "<!-- end -->"
_MEANT = re.compile(r"<!--\s*(generated|end)\b")


def render_page(text: str) -> str:
    """A page with every generated block renewed.

    Raises:
        KeyError: an unknown block.
        ValueError: marks that do not pair up, with the line of the first one that does not.
    """
    _require_pairs(text)

    def renew(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}"

    pattern = rf"({_BEGIN.pattern})\n.*?({_END})"
    return re.sub(pattern, renew, text, flags=re.DOTALL)


def _require_pairs(text: str) -> None:
    """A block without an end would swallow what a person wrote, up to the end of the next one."""
    block, since = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        begin = _BEGIN.fullmatch(line)
        if begin and block:
            break
        if begin:
            block, since = begin[1], number
        elif line == _END and not block:
            raise ValueError(f"line {number}: an end mark without a block before it")
        elif line == _END:
            block = ""
        elif _MEANT.search(line):
            raise ValueError(f"line {number}: {line.strip()!r} is no mark of a block, nor an end")
    if block:
        raise ValueError(f"line {since}: block {block!r} has no end mark")


def outputs() -> dict[Path, str]:
    """Every generated file with its content."""
    files = {ROOT / page: _page(page) for page in PAGES}
    for name in zoo.names():
        result = read(f"zoo_{name}")
        if result is not None:
            files[ROOT / "accel" / "zoo" / name / "README.md"] = zoo_card.card(result)
    for package in OWN:
        rows = index_rows(package)
        files[ROOT / package / INDEX_FILE] = json.dumps(rows, indent=1) + "\n"
    return files


def _page(page: str) -> str:
    try:
        return render_page((ROOT / page).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None


def stale_pictures() -> list[Path]:
    """Pictures that were not drawn from the results there are now."""
    pairs = [(PICTURE[device], path("waterfall", device)) for device in DEVICES]
    return [p for p, source in pairs if source.is_file() and not drawn_from(p, source)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    check = parser.parse_args().check
    assert set(OWN) <= set(packages()), "install the project first"
    made = outputs()
    stale = [
        target
        for target, content in made.items()
        if not target.is_file() or target.read_text("utf-8") != content
    ]
    for target in [] if check else stale:
        target.write_text(made[target], "utf-8")
    for target in stale:
        print(f"{'out of date' if check else 'wrote'}: {target.relative_to(ROOT)}")
    pictures = stale_pictures()
    for picture in pictures:
        print(f"out of date: {picture.name}; run python -m benchmarks.waterfall --draw")
    if not stale and not pictures:
        print("up to date")
    return int(bool(pictures) or (check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
