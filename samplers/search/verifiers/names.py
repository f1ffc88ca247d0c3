"""Verifiers by name, for command lines and job files."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from samplers.search.verifiers.digits import DigitsJudge
from samplers.search.verifiers.pixels import PIXELS
from samplers.search.verifiers.protocol import RankEnsemble
from samplers.search.verifiers.worker import HttpVerifier, ProcessVerifier

GROUP = "accel.verifiers"
SAID = (
    f"{', '.join(PIXELS)}, judge or referee (embedded models), clip:FOLDER, siglip:FOLDER, "
    "pickscore:FOLDER, hps:FOLDER or hps:FOLDER,CHECKPOINT, aesthetic:FOLDER,HEAD, "
    "worker:COMMAND, http://..., what a package has "
    f"registered under the entry-point group {GROUP!r}, or several joined by + (mean of ranks)"
)


def verifier_named(text: str, *, device: str = "cpu", trusted: bool = True) -> Any:
    """The verifier that a text names; see ``SAID``.

    Args:
        trusted: whether it may start a command or call a server; not from a job file.

    Raises:
        ValueError: it names none; says what is known.
    """
    if "+" in text and not text.startswith(("worker:", "http:", "https:")):
        parts = [verifier_named(t, device=device, trusted=trusted) for t in text.split("+")]
        return RankEnsemble(tuple(parts))
    kind, _, rest = text.partition(":")
    if kind in ("worker", "http", "https") and not trusted:
        raise ValueError(
            f"verifier {text!r}: a job file starts no command and calls no server; "
            "`accel search` does, and with --trust-verifiers `accel resume` and `accel retry`"
        )
    if kind == "worker":
        return ProcessVerifier(rest)
    if kind in ("http", "https"):
        return HttpVerifier(text)
    if text in PIXELS:
        return PIXELS[text]()
    if text in ("judge", "referee"):
        return DigitsJudge("digits-judge" if text == "judge" else "digits-judge-b")
    if kind in ("clip", "siglip", "pickscore", "hps") and rest:
        from samplers.search.verifiers.text_image import TextImage

        folder, _, weights = rest.partition(",") if kind == "hps" else (rest, "", "")
        return TextImage(kind, folder, weights or None, device=device)
    if kind == "aesthetic" and "," in rest:
        from samplers.search.verifiers.text_image import Aesthetic

        folder, _, head = rest.rpartition(",")
        return Aesthetic(folder, head, device=device)
    for entry in entry_points(group=GROUP):
        if entry.name == text:
            made = entry.load()
            return made() if isinstance(made, type) else made
    raise ValueError(f"no verifier {text!r}; known: {SAID}")
