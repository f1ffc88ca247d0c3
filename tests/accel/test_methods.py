"""Method names, third-party packages, the index."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from accel import methods
from accel.method import Method

THIRD_PARTY = '''
from dataclasses import dataclass
from accel.method import Method

@dataclass(frozen=True)
class Gentle(Method):
    """A method of somebody else."""

    strength: float = 0.5

    def claims(self, pipe):
        return frozenset()

    def build(self, pipe, live):
        live.around_call(pipe.transformer, lambda call_next, *a, **k: call_next(*a, **k))

    def neutral(self):
        return self
'''


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed distribution with one method, as pip would leave it."""
    package = tmp_path / "gentle_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "soft.py").write_text(THIRD_PARTY)
    (package / "_hidden.py").write_text(THIRD_PARTY)
    row = {"name": "gentle_methods.soft:Gentle", "summary": "soft", "slots": [], "measured": None}
    (package / methods.INDEX_FILE).write_text(json.dumps([row]))
    info = tmp_path / "gentle_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gentle-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[accel.methods]\ngentle = gentle_methods\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    methods.packages.cache_clear()
    yield tmp_path
    methods.packages.cache_clear()
    for name in [n for n in sys.modules if n.startswith("gentle_methods")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_own_packages_are_registered():
    assert set(methods.packages()) >= {"samplers", "caches", "quant", "sparse_attn"}


def test_third_party_method_in_a_recipe_file(third_party, tmp_path):
    from accel.recipe_file import read_recipe, write_recipe
    from accel.testing import checks, conform

    cls = methods.resolve("gentle_methods.soft:Gentle")
    assert issubclass(cls, Method)
    from accel.method import Recipe

    write_recipe(tmp_path / "r.yaml", Recipe((cls(strength=0.25),)))
    assert read_recipe(tmp_path / "r.yaml").recipe.methods == (cls(strength=0.25),)
    for check in checks():
        conform(check, cls(), "dit")
    assert "gentle_methods.soft:Gentle" in [row["name"] for row in methods.index()]
    with pytest.raises(ValueError, match="not a method name"):
        methods.resolve("gentle_methods._hidden:Gentle")


def test_unregistered_packages_are_refused_before_any_import(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    (tmp_path / "evil_pkg").mkdir()
    (tmp_path / "evil_pkg" / "mod.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="not registered"):
        methods.resolve("evil_pkg.mod:Thing")
    assert "evil_pkg" not in sys.modules


def test_index_needs_no_torch():
    code = (
        "import sys, accel, accel.methods; accel.methods.index(); "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_row_of_the_index_is_a_method_with_these_fields():
    for row in methods.index():
        cls = methods.resolve(row["name"])
        assert row["slots"] == sorted(cls.SLOTS)
        assert row["summary"]
        assert row["measured"], "nothing is listed before it is measured"
