"""The report as one HTML page that needs no network: figures, plots and the worst cases.

Everything that comes from outside (prompts, names, notes) is escaped; the page has no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from apps.evaluation.pictures import difference, frame, tag
from apps.evaluation.plots import Bar, Point, bars, curve, pareto, strips
from apps.evaluation.style import STYLE

EXAMPLES = 8  # first samples, shown of every side
# The figure that stands for quality beside speed, by kind of evaluation.
LEADING = {"fidelity": "psnr", "judge": "right_all", "fid": "frechet", "clip": "clip"}
KIND_WORDS = {
    "fidelity": "fidelity to the baseline",
    "judge": "what the judge says",
    "fid": "distances to real samples",
    "clip": "fit to the prompt",
}

Report = dict[str, Any]


def write_page(found: Report, folder: Path, target: Path) -> None:
    """Write the page; `folder` holds the renders, for the pictures."""
    from accel.files import write_atomically

    write_atomically(target, page(found, folder).encode())


def page(found: Report, folder: Path) -> str:
    """The page as text. Raises ValueError if a render that it shows is gone."""
    title = f"{found['model']['name']}: {', '.join(r['label'] for r in found['recipes'])}"
    sections = [
        _head(found),
        _warnings(found["warnings"]),
        _verdicts(found),
        _speed(found),
        _plots(found),
        *(_table(found, kind) for kind in LEADING),
        _spread(found),
        _examples(found, folder),
        *(_worst(found, row, folder) for row in found["recipes"]),
        _groups(found),
        _protocol(found),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(sections)}</main></body></html>\n"
    )


# -- words -----------------------------------------------------------------------------------


def number(x: float) -> str:
    """Two or three digits."""
    if x == 0:
        return "0"
    size = abs(x)
    if size >= 100:
        return f"{x:.0f}"
    if size >= 1:
        return f"{x:.1f}" if size >= 10 else f"{x:.2f}"
    return f"{x:.3f}" if size >= 0.1 else f"{x:.2g}"


def interval(value: dict[str, float] | None, unit: str = "", *, signed: bool = False) -> str:
    """An estimate with its interval, as text."""
    if value is None:
        return "-"
    plain = (lambda x: f"{x:.1f}") if unit in ("%", "points", "dB") else number
    form = (lambda x: ("+" if x > 0 else "") + plain(x)) if signed else plain
    unit = f"\u202f{unit}" if unit and unit != "x" else unit
    return f"{form(value['estimate'])}{unit} ({form(value['low'])} to {form(value['high'])})"


def is_seen(figure: dict[str, Any]) -> bool:
    """Whether a change is more than chance: by its interval, and by the test where there is one."""
    change, p = figure["difference"], figure.get("p")
    return (change["low"] > 0 or change["high"] < 0) and (p is None or p < 0.05)


def verdict(row: dict[str, Any]) -> str:
    """One recipe in a sentence or two, from its figures alone."""
    parts = []
    if row["fallbacks"]:
        parts.append(f"{row['fallbacks']} calls came out broken, made again without it")
    if row["speedup"]:
        parts.append(f"{interval(row['speedup'], 'x')} as fast")
    figures = row["figures"]
    if "psnr" in figures:
        parts.append(f"PSNR {interval(figures['psnr']['value'], 'dB')}")
    for name in ("right_all", "frechet", "clip"):
        figure = figures.get(name)
        if figure is None or not figure.get("difference"):
            continue
        change = figure["difference"]
        seen = is_seen(figure)
        unit = "points" if figure["unit"] == "%" else figure["unit"]
        said = f"{figure['label']} {interval(change, unit, signed=True)}"
        parts.append(said + ("" if seen else ": no difference seen"))
    return "; ".join(parts) + "." if parts else "nothing was measured."


def _head(found: Report) -> str:
    where, count = found["environment"], found["samples"]
    what = "videos" if found["videos"] else "pictures"
    base = found["baseline"]
    against = "" if base["recipe"] is None else f" Baseline: {escape(base['label'])}."
    kinds = ", ".join(KIND_WORDS[k] for k in found["kinds"])
    calls = f"{found['calls']} call{'s' * (found['calls'] > 1)}"
    return (
        f"<header><h1>{escape(found['model']['name'])}</h1>"
        f"<p>{kinds[0].upper()}{kinds[1:]}: {count} {what} of {calls}, the same seeds on every "
        f"side.{against}</p>"
        f'<p class="faint">{escape(where["hardware"])}, {where["threads"]} thread(s); '
        f"{escape(where['date'])}; intervals are 95 %; ↑ higher is better, ↓ lower, = unchanged; "
        "protocol "
        f"<code>{found['protocol']['sha256'][:12]}</code></p></header>"
    )


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="warn"><h2>Before you believe it</h2><ul>{items}</ul></section>'


def _verdicts(found: Report) -> str:
    items = "".join(
        f"<li><strong>{escape(row['label'])}</strong>: {escape(verdict(row))}</li>"
        for row in found["recipes"]
    )
    return f'<section><ul class="verdicts">{items}</ul></section>'


# -- figures ---------------------------------------------------------------------------------


def _speed(found: Report) -> str:
    rows = [row for row in found["recipes"] if row["speedup"]]
    if not rows:
        return ""
    one = {"estimate": 1.0, "low": 1.0, "high": 1.0}
    drawn = [
        Bar(row["label"], row["speedup"], _beside(row), i)
        for i, row in enumerate(found["recipes"])
        if row["speedup"]
    ]
    drawn.sort(key=lambda bar: bar.value["estimate"])
    drawn = [Bar("baseline", one, "1.00x", None), *drawn]
    cells = [
        [
            escape(row["label"]),
            interval(row["speedup"], "x"),
            _ratio(row["flops"]),
            "-" if row["nfe"] is None else f"{row['nfe'][0]} → {row['nfe'][1]}",
            _ratio(row["peak_bytes"]),
        ]
        for row in rows
    ]
    head = ["recipe", "speed-up", "operations", "network evaluations", "peak memory"]
    note = "Operations and memory: share of what the baseline takes."
    plot = bars(drawn, "speed-up, timed in turn with the baseline")
    return _section("Speed", f"<figure>{plot}</figure>{_grid(head, cells)}", note)


def _beside(row: dict[str, Any]) -> str:
    """What a bar of speed is labelled with: the speed, and what it costs."""
    figures, words = row["figures"], f"{row['speedup']['estimate']:.2f}x"
    if "psnr" in figures:
        words += f", {number(figures['psnr']['value']['estimate'])} dB"
    elif "right_all" in figures:
        words += f", {number(figures['right_all']['value']['estimate'])} % right"
    elif "frechet" in figures:
        words += f", FD {number(figures['frechet']['value']['estimate'])}"
    return words


def _ratio(pair: list[int] | None) -> str:
    return "-" if not pair or not pair[0] else f"{100 * pair[1] / pair[0]:.0f}\u202f%"


def _plots(found: Report) -> str:
    """Speed against quality, once for each kind, where several recipes were timed."""
    plots = []
    for kind in found["kinds"]:
        leading = LEADING[kind]
        rows = [r for r in found["recipes"] if r["speedup"] and leading in r["figures"]]
        if len(rows) < 2:
            continue
        points = [Point(r["label"], r["speedup"], r["figures"][leading]["value"]) for r in rows]
        figure = rows[0]["figures"][leading]
        unit = f" ({figure['unit']})" if figure["unit"] else ""
        higher = figure["better"] == "higher"
        label = f"{figure['label']}{unit}, {'higher' if higher else 'lower'} is better"
        plots.append(f"<figure>{pareto(points, 'speed-up (x)', label, higher=higher)}</figure>")
    if not plots:
        return ""
    note = "Crosses are 95 % intervals; the line joins what no other recipe beats in both."
    return _section("Speed against quality", f'<div class="plots">{"".join(plots)}</div>', note)


def _table(found: Report, kind: str) -> str:
    """All figures of a kind: rows are figures, columns sides."""
    rows = [row for row in found["recipes"] if row["figures"]]
    names = [n for n in dict.fromkeys(n for r in rows for n in r["figures"]) if _kind(n) == kind]
    if not names:
        return ""
    has_base = any(r["figures"].get(n, {}).get("baseline") for r in rows for n in names)
    head = ["figure", *(["baseline"] if has_base else []), *(escape(r["label"]) for r in rows)]
    cells = []
    for name in names:
        figure = next(r["figures"][name] for r in rows if name in r["figures"])
        better = {"higher": "↑", "lower": "↓", "same": "="}[figure["better"]]
        what = f"{escape(figure['label'])} {better}"
        if figure.get("floor") is not None:
            what += f"<small>other real samples: {number(figure['floor'])}</small>"
        if figure.get("note"):
            what += f"<small>{escape(figure['note'])}</small>"
        line = [what]
        if has_base:
            line.append(interval(figure.get("baseline"), figure["unit"]))
        line += [_cell(row["figures"].get(name)) for row in rows]
        cells.append(line)
    note = ""
    if kind == "fidelity" and found["unrelated_psnr"] is not None:
        note = (
            f"For scale: unrelated outputs of this model have a PSNR of "
            f"{number(found['unrelated_psnr'])} dB. Fidelity says how much changed, not whether "
            "for the worse."
        )
    if kind == "fid":
        note = (
            "Every side has as many samples, on whose count a Frechet distance depends. A floor "
            "says what as many other real samples score."
        )
    return _section(KIND_WORDS[kind].capitalize(), _grid(head, cells), note)


def _kind(name: str) -> str:
    from apps.evaluation.figures import MEASURES

    if name in MEASURES:
        return MEASURES[name].kind
    return "judge" if name.startswith("right_") else "fid"


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    text = interval(figure["value"], figure["unit"])
    change = figure.get("difference")
    if change:
        unit = "points" if figure["unit"] == "%" else figure["unit"]
        seen = is_seen(figure)
        worse = (change["estimate"] < 0) == (figure["better"] == "higher")
        mark = ("worse" if worse else "better") if seen and figure["better"] != "same" else "faint"
        p = f", p = {figure['p']:.2g}" if figure.get("p") is not None else ""
        text += f'<small class="{mark}">{interval(change, unit, signed=True)}{p}</small>'
    return text


def _spread(found: Report) -> str:
    """PSNR of every sample: a mean hides the tail, and the tail is what people see."""
    rows = [(r["label"], r["per_sample"]["psnr"]) for r in found["recipes"] if r["per_sample"]]
    if "fidelity" not in found["kinds"] or not rows:
        return ""
    scale = found["unrelated_psnr"]
    marks = {} if scale is None else {"unrelated outputs": scale}
    plot = strips(rows, "PSNR to the baseline (dB), one dot a sample", marks)
    return _section("Every sample", f"<figure>{plot}</figure>", "The line is the median.")


# -- pictures --------------------------------------------------------------------------------


def _examples(found: Report, folder: Path) -> str:
    """The first samples of every side: chosen by nothing."""
    rows = []
    for side in [found["baseline"], *found["recipes"]]:
        cells = [
            f"<td>{tag(frame(folder, stem, i), words)}</td>"
            for stem, i, words in _first(found, side, folder)
        ]
        rows.append(f"<tr><th>{escape(side['label'])}</th>{''.join(cells)}</tr>")
    table = f'<div class="scroll"><table class="pictures">{"".join(rows)}</table></div>'
    return _section("The first samples", table, "Not chosen: the first of the evaluation.")


def _first(found: Report, side: dict[str, Any], folder: Path) -> list[tuple[str, int, str]]:
    from apps.render.outputs import read_sidecar

    places: list[tuple[str, int, str]] = []
    for stem in sorted(p.stem for p in folder.glob(f"{side['name']}-?????.json")):
        content = read_sidecar(folder / f"{stem}.json")
        count = 0 if content is None else _samples(content)
        places += [(stem, i, f"{stem}, sample {i}") for i in range(count)]
        if len(places) >= EXAMPLES:
            break
    return places[:EXAMPLES]


def _samples(content: dict[str, Any]) -> int:
    names = [f["name"] for f in content["files"]]
    return sum(not n.endswith(".npz") for n in names)


def _worst(found: Report, row: dict[str, Any], folder: Path) -> str:
    """Where the acceleration hurts most: baseline, accelerated, difference, side by side."""
    if not row["worst"]:
        return ""
    cards = "".join(_card(case, folder) for case in row["worst"])
    note = "Lowest PSNR of all samples"
    if any("right" in case and case["right"] == [True, False] for case in row["worst"]):
        note = "First what was right and is wrong now, then the lowest PSNR of all samples"
    body = f'<div class="cards">{cards}</div>'
    return _section(f"Where {escape(row['label'])} hurts most", body, f"{note}.")


def _card(case: dict[str, Any], folder: Path) -> str:
    curve_values = case.get("frame_psnr")
    frame_number = None
    if curve_values:
        frame_number = min(range(len(curve_values)), key=curve_values.__getitem__)
    a, b = (frame(folder, stem, case["within"], frame_number) for stem in case["files"])
    gap, factor = difference(a, b)
    words = case["label"]
    pictures = "".join(
        f"<figure>{tag(pixels, f'{words}: {what}')}<figcaption>{what}</figcaption></figure>"
        for pixels, what in ((a, "baseline"), (b, "accelerated"), (gap, f"difference x {factor}"))
    )
    facts = [f"seed {case['seed']}", f"{number(case['psnr'])} dB"]
    if "ssim" in case:
        facts.append(f"SSIM {case['ssim']:.3f}")
    if frame_number is not None:
        facts.append(f"frame {frame_number}")
    if case.get("right") == [True, False]:
        facts.append('<b class="worse">right before, wrong now</b>')
    line = curve(curve_values, "PSNR by frame") if curve_values else ""
    return (
        f'<div class="card"><p><strong>{escape(words)}</strong><br>{", ".join(facts)}</p>'
        f'<div class="three">{pictures}</div>{line}</div>'
    )


def _groups(found: Report) -> str:
    """What kinds of samples lose most."""
    parts = []
    for row in found["recipes"]:
        words = [
            [escape(g["word"]), str(g["samples"]), interval(g["psnr"], "dB"),
             f"{g['difference']:+.1f} dB"]
            for g in row["by_word"][:6]
        ]  # fmt: skip
        labels = [
            [escape(g["label"]), str(g["samples"]), interval(g["psnr"], "dB")]
            for g in row["by_label"][:6]
        ]
        body = ""
        if words:
            body += _grid(["asked for", "samples", "PSNR", "than the others"], words)
        if labels:
            body += _grid(["asked for", "samples", "PSNR"], labels)
        if body:
            parts.append(f"<h3>{escape(row['label'])}</h3>{body}")
    note = "Means of samples that share a word, or all words, lowest first; many are compared."
    return _section("What it is worst at", "".join(parts), note) if parts else ""


def _protocol(found: Report) -> str:
    record = found["protocol"]
    rows = [[escape(k), f"<code>{escape(_short(v))}</code>"] for k, v in sorted(record.items())]
    methods = "".join(
        f"<li><strong>{escape(r['label'])}</strong> <code>{escape(str(r['sha256'])[:12])}</code>: "
        + escape("; ".join(_method(m) for m in r["methods"])) + "</li>"
        for r in found["recipes"]
    )  # fmt: skip
    return _section(
        "How it was measured",
        f"<ul>{methods}</ul><p>Again: <code>{escape(found['command'])}</code></p>"
        f"<details><summary>Protocol {record['sha256'][:12]}: figures compare only with others of "
        f"the same</summary>{_grid(['field', 'value'], rows)}</details>",
    )


def _method(record: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={_short(v, 40)}" for k, v in record.get("settings", {}).items())
    return f"{record['method']}({settings})"


def _short(value: Any, most: int = 160) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="faint">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{said}{body}</section>"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )
