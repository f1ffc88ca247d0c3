"""What a person in the browser may name: models, recipes, folders of results. Nothing else exists.

Every name that comes from a browser is looked up here, whatever the page offered; what is not
found is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PLAIN = "none"  # the name of no recipe at all
CREATE, BATCHES, RECIPES, REPORTS = "create", "batches", "recipes", "reports"
MEDIA = (".png", ".mp4")


class Refused(ValueError):
    """Something a person asked for that is not possible, said so that it can be shown to them."""


@dataclass(frozen=True)
class Site:
    """The folders and settings of one running app.

    out: everything the app writes, and all that it serves. models: `zoo:NAME` or folders.
    """

    out: Path
    models: tuple[str, ...]
    recipe_folders: tuple[Path, ...]
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    def model(self, name: object) -> str:
        """The model of this name, as the renderer takes it."""
        if name not in self.models:
            raise Refused(
                f"The model {str(name)[:80]!r} is not one of this app's. "
                "Start it with --model FOLDER to add one."
            )
        return str(name)

    def recipes(self) -> dict[str, Path]:
        """Recipe files by name; a name that stands twice belongs to the folder given first."""
        found: dict[str, Path] = {}
        for folder in (*self.recipe_folders, self.out / RECIPES):
            for path in sorted(folder.glob("*.yaml")):
                found.setdefault(path.stem, path)
        return found

    def recipe(self, name: object) -> Path:
        """The recipe file of this name."""
        path = self.recipes().get(str(name))
        if path is None:
            raise Refused(f"There is no recipe called {str(name)[:80]!r} here.")
        return path

    def renders(self) -> dict[str, Path]:
        """Folders below `out` that hold results, by their path below it, newest first."""
        ours = (folder for folder in self._folders() if self._top(folder) != REPORTS)
        found = [folder for folder in ours if any(folder.glob("*.json"))]
        found.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        return {folder.relative_to(self.out).as_posix(): folder for folder in found}

    def render(self, name: object) -> Path:
        """The folder of results of this name."""
        folder = self.renders().get(str(name))
        if folder is None:
            raise Refused(f"There are no results called {str(name)[:80]!r} here.")
        return folder

    def serves(self, path: str) -> bool:
        """Whether a file may be sent to a browser: finished pictures and videos below `out`."""
        real, root = Path(path).resolve(), self.out.resolve()
        if not real.is_relative_to(root) or real.suffix not in MEDIA:
            return False
        return not any(part.startswith(".") for part in real.relative_to(root).parts)

    def _top(self, folder: Path) -> str:
        return folder.relative_to(self.out).parts[0]

    def _folders(self) -> Iterator[Path]:
        for pattern in ("*", "*/*"):
            for folder in self.out.glob(pattern):
                inside = folder.relative_to(self.out).parts
                if folder.is_dir() and not any(part.startswith(".") for part in inside):
                    yield folder
