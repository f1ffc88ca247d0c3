"""Which rows of an earlier run stay: those of this machine, these versions and these settings.

A row whose settings are no longer those to be measured is measured again, though its name is the
same: another student or schedule in the same file is another method.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accel.measure import Study
from accel.method import Method, Recipe
from accel.metrics.protocol import Protocol, require_same
from benchmarks.digits_study import records, row
from benchmarks.results_file import require_machine


@dataclass(frozen=True)
class Calibrated:
    """A method that is calibrated when its row is measured. settings: what that depends on, JSON;
    they are kept with the row, as the artifact's digest may differ from run to run."""

    make: Callable[[], Method]
    settings: dict[str, Any]


Planned = Recipe | Calibrated


def kept_rows(old: dict[str, Any] | None, protocol: Protocol, here: dict[str, Any]) -> Any:
    """Rows of an earlier run that new ones may stand beside.

    Raises:
        ValueError: they are of another protocol, machine, number of threads or of other versions.
    """
    if old is None:
        return {}
    if old["protocol"] is None:
        raise ValueError("the rows in the file have no protocol; measure all of them again")
    require_same(Protocol.read(old["protocol"]), protocol)
    require_machine(old["environment"], here)
    rows = old["rows"]
    for found in rows.values() if isinstance(rows, dict) else rows:
        if "environment" in found:
            require_machine(found["environment"], here)
    return rows


def stays(found: dict[str, Any] | None, planned: Recipe | dict[str, Any], *artifacts: str) -> bool:
    """Whether a row (if there is one) is of this recipe, or of these settings of a calibration.

    A row without settings stays. ``artifacts``: folders, as in ``digits_study.row``.
    """
    if found is None:
        return False
    if isinstance(planned, Recipe):
        return found["methods"] == records(planned, *artifacts)
    return found.get("calibration") in (None, json.loads(json.dumps(planned)))


def due(
    plans: dict[str, Planned], there: dict[str, Any], fresh: bool, *artifacts: str
) -> list[str]:
    """Names of the rows to measure: those that are not there, or of other settings; or all."""
    found = []
    for name, planned in plans.items():
        wanted = planned.settings if isinstance(planned, Calibrated) else planned
        if fresh or not stays(there.get(name), wanted, *artifacts):
            found.append(name)
    return found


def measured(bench: Study, planned: Planned, rounds: int, *artifacts: str) -> dict[str, Any]:
    """A row as ``schema.Row`` has it, with the settings of its calibration."""
    if isinstance(planned, Recipe):
        return row(planned, bench.compare(planned, rounds=rounds), *artifacts)
    recipe = Recipe((planned.make(),))
    made = row(recipe, bench.compare(recipe, rounds=rounds), *artifacts)
    return {**made, "calibration": planned.settings}
