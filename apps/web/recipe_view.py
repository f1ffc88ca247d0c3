"""Recipes as the page shows them: what is in one, what it was measured to do, as a file to keep."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web import markup
from apps.web.checks import settings_in_words
from apps.web.imports import once
from apps.web.site import PLAIN

if TYPE_CHECKING:
    from accel.recipe_file import RecipeFile
    from apps.web.page import App

GOOD, FASTER = 30.0, 1.2  # dB of PSNR and speed-up of the recipe proposed first, if one has both


def read(path: Path) -> RecipeFile:
    """Read a recipe file; ValueError says what is wrong with it."""
    once()
    import accel

    found = accel.read_recipe(path)
    try:
        _effect(found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(
            f"{path}: its 'measured' block is none that `accel measure` writes; "
            "remove the block, or measure again"
        ) from None
    return found


def choices(app: App, model: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Recipes that fit a model as (label, name), fastest first; those that do not, with why."""
    fit: list[tuple[float, str, str]] = []
    left_out: dict[str, str] = {}
    for name, path in app.site.recipes().items():
        try:
            found = read(path)
            problem = app.checks.problem(model, found.recipe.methods)
        except (ValueError, OSError) as error:
            problem = str(error)
            found = None
        if found is None or problem is not None:
            left_out[name] = problem or ""
            continue
        measured = measured_on(found, model)
        speed = measured["speedup"]["estimate"] if measured else 0.0
        words = f"{name}: {speed:.1f}x as fast, {_quality(measured)}" if measured else name
        fit.append((-speed, words, name))
    return [("nothing (baseline only)", PLAIN)] + [(w, n) for _, w, n in sorted(fit)], left_out


def default_choice(app: App, model: str, fit: list[tuple[str, str]]) -> str:
    """The fastest recipe measured on the model that keeps PSNR, if one gains anything; else the
    fastest; else none."""
    names = [name for _, name in fit if name != PLAIN]
    for name in names:
        measured = measured_on(read(app.site.recipe(name)), model)
        if measured is None or measured["speedup"]["estimate"] < FASTER:
            break
        if measured["psnr"]["estimate"] >= GOOD:
            return name
    return names[0] if names else PLAIN


def measured_on(found: RecipeFile, model: str) -> dict[str, Any] | None:
    """The recipe's figures, if they were measured on this model."""
    return found.measured if found.measured and found.measured.get("model") == model else None


def told(app: App, name: str, model: str, left_out: dict[str, str] | None = None) -> str:
    """A few lines on a recipe, below the field where it is chosen."""
    if name == PLAIN:
        words = "<p>Only the unmodified model is rendered.</p>"
    else:
        found = read(app.site.recipe(name))
        words = f"<p>{markup.text(found.description or _methods(found))}</p>"
        measured = measured_on(found, model)
        if measured is None:
            where = (found.measured or {}).get("model")
            said = f"Measured on {where} only." if where else "Not measured yet."
            words += f"<p>{markup.text(said)}</p>"
    if left_out:
        rows = [
            f"<li><b>{markup.text(n)}</b>: {markup.text(why)}</li>" for n, why in left_out.items()
        ]
        title = f"{len(rows)} more do not fit this model"
        words += markup.details(title, f"<ul>{''.join(rows)}</ul>")
    return f'<div class="ac-hint">{words}</div>'


def inspect(path: Path) -> str:
    """Everything about one recipe."""
    found = read(path)
    rows = []
    for number, method in enumerate(found.recipe.methods, start=1):
        kept = settings_in_words(method) or "defaults"
        name = f"<b>{type(method).__name__}</b>"
        source = markup.text(type(method).PAPER or "-")
        rows.append((str(number), name, markup.text(kept), source))
    parts = [f"<h2>{markup.text(found.name)}</h2>"]
    if found.description:
        parts.append(f"<p>{markup.text(found.description)}</p>")
    head = ("order", "method", "settings", "source")
    parts.append(markup.table(head, rows, "Methods, the first innermost"))
    parts += [_schedule(method) for method in found.recipe.methods]
    parts.append(_effect(found))
    return f'<section class="ac-recipe">{"".join(parts)}</section>'


def packed(path: Path) -> bytes:
    """The recipe with its artifacts as a zip file, to be unpacked anywhere."""
    from accel.artifact import ArtifactRef

    found = read(path)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, path.name)
        for method in found.recipe.methods:
            for value in vars(method).values():
                if isinstance(value, ArtifactRef):
                    place = Path(value.path).relative_to(path.parent.resolve())
                    archive.write(value.path, place.as_posix())
    return target.getvalue()


def _effect(found: RecipeFile) -> str:
    measured = found.measured
    if not measured:
        words = "Nobody has measured this recipe yet: accel measure RECIPE --model MODEL does."
        return markup.notice(words, "info")
    judged = measured.get("judged")
    rows = [("Speed-up", _interval(measured["speedup"], "{:.2f}x"))]
    if measured.get("flops"):
        before, after = measured["flops"]
        rows.append(("Floating-point work", f"{after / before:.0%} of the baseline's"))
    if measured.get("nfe"):
        before, after = measured["nfe"]
        rows.append(("Network evaluations", f"{after:,} instead of {before:,}"))
    if measured.get("peak_bytes"):
        before, after = measured["peak_bytes"]
        rows.append(("Peak memory", f"{after / before:.0%} of the baseline's"))
    rows.append(("PSNR to baseline", _interval(measured["psnr"], "{:.1f} dB")))
    if measured.get("ssim"):
        rows.append(("SSIM to baseline", _interval(measured["ssim"], "{:.3f}")))
    if judged:
        change = _interval(judged["accuracy"]["difference"], "{:+.1%}")
        rows.append((f"Right by the referee {judged['referee']}", f"change {change}"))
    where = measured.get("environment") or {}
    words = (
        f"Measured on {measured.get('model')}: {measured.get('samples')} samples, "
        f"{measured.get('rounds')} rounds in turn; {where.get('hardware')}, "
        f"{where.get('threads')} thread(s), {where.get('date')}. In brackets: 95 % intervals."
    )
    cells = [(markup.text(name), markup.text(value)) for name, value in rows]
    return (
        markup.table(("figure", "accelerated against unmodified"), cells, "Measured effect")
        + f'<p class="ac-note">{markup.text(words)}</p>'
        + markup.details("Everything that was measured", markup.data(measured))
    )


def _schedule(method: Any) -> str:
    """The schedule of a method that has one on disk, as a map."""
    from accel.artifact import Artifact
    from caches.schedule import of_artifact

    if not hasattr(method, "artifact") or "block.skip" not in type(method).SLOTS:
        return ""
    try:
        schedule = of_artifact(Artifact.load(method.artifact))
    except (ValueError, KeyError, TypeError, OSError):
        return ""
    rows = [[int(letter == "C") for letter in row] for row in schedule.rows]
    words = f"{schedule.steps} steps, {schedule.share():.0%} of the cells computed"
    image = markup.heat_map(rows, schedule.steps, 1, f"Schedule: {words}")
    return (
        '<figure class="ac-heat"><figcaption>Schedule<span class="ac-key"><i class="ac-c"></i>'
        'computed <i class="ac-r"></i>not computed</span></figcaption>'
        f"{image}<p>{markup.text(words)}.</p></figure>"
    )


def _methods(found: RecipeFile) -> str:
    return " + ".join(type(method).__name__ for method in found.recipe.methods)


def _quality(measured: dict[str, Any]) -> str:
    return f"{measured['psnr']['estimate']:.0f} dB"


def _interval(value: dict[str, float], form: str) -> str:
    low, high = form.format(value["low"]), form.format(value["high"])
    return f"{form.format(value['estimate'])} ({low} to {high})"
