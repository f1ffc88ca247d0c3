"""The house rules: who may import whom, how long a file may be, what a test mirrors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = "accel"
WINGS = ("samplers", "caches", "quant", "sparse_attn")
TOP = ("apps", "benchmarks", "tests")
MAX_LINES = 400
MAX_PARAMETERS = 6
FORBIDDEN_NAMES = {"utils", "helpers", "common", "base", "manager", "engine", "core"}


def _files(*folders: str) -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


def _imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def _defines_method(path: Path) -> bool:
    """Whether a file has a public class that derives from Method, Search or Trainer."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = {ast.unparse(b).split(".")[-1] for b in node.bases}
            if bases & {"Method", "Search", "Trainer"}:
                return True
    return False


METHOD_FILES = [p for p in _files(*WINGS) if _defines_method(p)]


def test_top_level_folders_are_the_agreed_ones():
    have = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    allowed = {CORE, *WINGS, *TOP, "recipes", "examples", "demo", "build", "dist", "out"}
    assert have <= allowed | {n for n in have if n.endswith(".egg-info") or n == "__pycache__"}


@pytest.mark.parametrize("path", _files(CORE), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_knows_no_method(path):
    first = {name.split(".")[0] for name in _imports(path)}
    assert not first & {*WINGS, *TOP}, f"{path} imports {first & {*WINGS, *TOP}}"


@pytest.mark.parametrize("path", _files(*WINGS), ids=lambda p: str(p.relative_to(ROOT)))
def test_methods_meet_only_as_values(path):
    wing = path.relative_to(ROOT).parts[0]
    for name in _imports(path):
        first = name.split(".")[0]
        assert first not in {*TOP, *WINGS} - {wing}, f"{path} imports {name}"
        if path.name == "__init__.py":
            continue  # re-exports
        target = ROOT / Path(*name.split(".")).with_suffix(".py")
        if first == wing and target in METHOD_FILES and target != path:
            raise AssertionError(f"{path} imports the method file {target.name}")


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_method_files_are_short_and_have_a_mirrored_test(path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES
    relative = path.relative_to(ROOT)
    mirror = ROOT / "tests" / relative.parent / f"test_{relative.name}"
    assert mirror.is_file(), f"{mirror} is missing"


@pytest.mark.parametrize(
    "path", _files(CORE, *WINGS, "apps", "benchmarks"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_style(path):
    assert path.stem not in FORBIDDEN_NAMES
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"


def test_no_packages_under_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("path", _files(CORE, *WINGS), ids=lambda p: str(p.relative_to(ROOT)))
def test_host_attributes_are_set_only_by_patch(path):
    """No ``pipe.x = ...`` outside accel/patch.py; tests' own pipelines and training aside."""
    if path.name in ("patch.py", "tiny.py", "testing.py", "compat.py") or "zoo" in path.parts:
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute):
                owner = ast.unparse(target.value).split(".")[-1]
                hosts = {"pipe", "transformer", "unet", "vae", "denoiser", "block"}
                assert owner not in hosts, f"{path}:{node.lineno}: {ast.unparse(node)}"
