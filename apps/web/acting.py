"""What the events of all tabs do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from apps.web import markup
from apps.web.checks import sentence
from apps.web.site import Refused

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
SECRET = "accel: kept over restarts"  # what a browser remembers is no secret to its own machine
# Of an event that shows what fields have now: what comes while it runs is not lost.
LAST = {**QUIET, "trigger_mode": "always_last"}


def offered(names: list[str], chosen: str | None, **more: Any) -> Any:
    """An update of a list of names that leaves a choice alone which is still among them: a person
    may have chosen another meanwhile."""
    if chosen in names:
        return gr.update(choices=names, **more)
    return gr.update(choices=names, value=next(iter(names), None), **more)


def acting(do: Callable[[Any], Any]) -> Callable[[Any], str]:
    """`do` as an event of the page whose output is a notice, empty if all went well."""

    def act(name: Any) -> str:
        try:
            do(name)
        except (Refused, ValueError, OSError) as error:
            return markup.notice(sentence(str(error)))
        return ""

    return act
