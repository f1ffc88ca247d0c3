"""Which methods exist: names, where they may come from, and the generated index. Imports no torch.

A recipe names a method as ``"caches.native:FirstBlockCache"``. The package must be listed under the
entry-point group ``accel.methods`` and every part of the module path must be public; both are
checked before anything is imported, so a recipe file cannot run code of its choosing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.method import Method

GROUP = "accel.methods"
INDEX_FILE = "methods.json"
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+:[A-Z][A-Za-z0-9]*")


@cache
def packages() -> tuple[str, ...]:
    """Top-level packages that may hold methods, as installed."""
    return tuple(sorted({e.value for e in entry_points(group=GROUP)}))


def resolve(name: str) -> type[Method]:
    """The method class called ``name``.

    Raises:
        ValueError: malformed name, package not registered, no such module or class, or a class
            that is not a method.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a method name like 'caches.native:FirstBlockCache'")
    module_name, _, class_name = name.partition(":")
    package = module_name.split(".")[0]
    if package not in packages():
        raise ValueError(
            f"{name}: package {package!r} is not registered under the entry-point group "
            f"{GROUP!r}; registered: {list(packages())}"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise ValueError(f"{name} needs {error.name!r}, which is not installed") from error
        raise ValueError(f"{name}: there is no module {module_name!r}") from error
    from accel.method import Method

    found = vars(module).get(class_name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{module_name} has no method {class_name!r}")
    return found


def index() -> list[dict[str, Any]]:
    """Rows of every registered package's ``methods.json``, by name.

    A row has name, summary, paper, slots, fields and measured (``None`` or figures with their
    hardware). The file is generated from the classes and from measured results.
    """
    rows: list[dict[str, Any]] = []
    for package in packages():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / INDEX_FILE
            if path.is_file():
                rows += json.loads(path.read_text("utf-8"))
    return sorted(rows, key=lambda row: row["name"])
