"""What a button does, answering with what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apps.web import markup
from apps.web.checks import sentence
from apps.web.site import Refused


def acting(do: Callable[[Any], Any]) -> Callable[[Any], str]:
    """`do` as an event of the page whose output is a notice, empty if all went well."""

    def act(name: Any) -> str:
        try:
            do(name)
        except (Refused, ValueError, OSError) as error:
            return markup.notice(sentence(str(error)))
        return ""

    return act
