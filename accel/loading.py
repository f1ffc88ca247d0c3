"""Pipelines and their recipes from and to folders, by stock diffusers means.

``save`` writes what ``DiffusionPipeline.save_pretrained`` writes, plus ``accel_recipe.yaml``; stock
diffusers still loads that folder. ``load`` attaches the recipe. Safetensors only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accel.files import write_atomically
from accel.method import Recipe, live_on, require_detached
from accel.methods import packages
from accel.recipe_file import read_recipe, write_recipe

RECIPE_FILE = "accel_recipe.yaml"
QUANTIZER_MODULE = "diffusers_quantizer"
SHIM_FILE = "pipeline.py"
ZOO_PREFIX = "zoo:"
OF_THE_HUB = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "token"})

# The class keeps its stock name, so that saving the loaded pipeline stays stock.
_SHIM = '''"""This folder with its acceleration recipe attached, for stock diffusers:

    DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
"""

import accel.loading
import diffusers


class {name}(diffusers.{name}):
    __call__ = accel.loading.attached_call(diffusers.{name}.__call__)
'''


def load(
    ref: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """A diffusers pipeline from ``"zoo:NAME"``, a folder, or a hub id; its recipe attached.

    Args:
        dtype: as in ``from_pretrained``; default float32.
        device: moved there before the recipe is attached.
        trust_remote_code: passed on; off by default.

    Raises:
        ValueError: unknown zoo name, a device that is not here, a config that is none, or a
            recipe that does not fit.
        OSError: nothing there that diffusers can load.
    """
    import torch
    from diffusers import DiffusionPipeline

    _require_device(device)
    _teach_quantizers()
    source = str(zoo_path(str(ref)) if str(ref).startswith(ZOO_PREFIX) else ref)
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no diffusers pipeline (no model_index.json)")
    own = str(ref).startswith(ZOO_PREFIX)  # known to be whole: nothing to remark on
    with quiet_loading() if own else contextlib.nullcontext():
        try:
            pipe = DiffusionPipeline.from_pretrained(
                source,
                dtype=dtype or torch.float32,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **{"local_files_only": folder.is_dir(), **kwargs},
            )
        except (AttributeError, LookupError, TypeError) as error:  # a spoiled config
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"{source} cannot be loaded by diffusers ({told})") from error
    if device is not None:
        pipe.to(device)
    if not folder.is_dir():
        folder = recipe_folder(source, **{k: v for k, v in kwargs.items() if k in OF_THE_HUB})
    if (folder / RECIPE_FILE).is_file():
        read_recipe(folder / RECIPE_FILE).recipe.attach(pipe)
    return pipe


def recipe_folder(hub_id: str, **where: Any) -> Path:
    """The snapshot of a hub id with its recipe in it, if it has one; nothing else is fetched.

    ``where``: as in ``from_pretrained``, of ``OF_THE_HUB``. Raises ``OSError`` or ``ValueError``
    where there is neither a hub nor a snapshot.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=[RECIPE_FILE, "artifacts/*"], **where))


def _teach_quantizers() -> None:
    """Let diffusers know what checkpoints the packages of methods write: theirs may have a module
    ``diffusers_quantizer``, which registers itself when it is imported."""
    for package in packages():
        if importlib.util.find_spec(f"{package}.{QUANTIZER_MODULE}") is not None:
            importlib.import_module(f"{package}.{QUANTIZER_MODULE}")


def _require_device(device: Any) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # so says torch, by what it was built with
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from error


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence progress bars and log lines below errors of diffusers and transformers; what is wrong
    still raises."""
    import diffusers.utils.logging
    import transformers.utils.logging

    with contextlib.ExitStack() as restored:
        for logging in (diffusers.utils.logging, transformers.utils.logging):
            restored.callback(logging.set_verbosity, logging.get_verbosity())
            if logging.is_progress_bar_enabled():
                restored.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()
            logging.set_verbosity_error()
        yield


def zoo_path(ref: str) -> Path:
    """The folder of ``"zoo:NAME"``. Raises ``ValueError`` listing the known names."""
    from accel import zoo

    return zoo.path(ref.removeprefix(ZOO_PREFIX))


def save(
    pipe: Any,
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    measured: dict[str, Any] | None = None,
) -> Path:
    """Write ``pipe`` as a stock folder plus its recipe, and the ``custom_pipeline`` shim.

    Raises:
        ValueError: something is attached to ``pipe`` (the folder must hold the stock pipeline),
            or the recipe does not fit it.
    """
    require_detached(pipe, "saving; the recipe is saved beside the pipeline")
    recipe.attach(pipe).detach()
    target = Path(folder)
    pipe.save_pretrained(str(target), safe_serialization=True)
    write_recipe(target / RECIPE_FILE, recipe, name=name or target.name, measured=measured)
    shim = _SHIM.format(name=type(pipe).__name__)
    write_atomically(target / SHIM_FILE, shim.encode())
    return target


def attached_call(call: Any) -> Any:
    """``__call__`` of a ``custom_pipeline`` shim: attaches the folder's recipe, once.

    Who detaches it gets the stock pipeline. Raises ``ValueError`` where the recipe is not found
    (a relative folder, and another working directory by now).
    """
    import functools

    met: weakref.WeakSet[Any] = weakref.WeakSet()

    @functools.wraps(call)
    def with_recipe(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if pipe not in met and not live_on(pipe):
            read_recipe(_recipe_of(str(pipe.config._name_or_path))).recipe.attach(pipe)
        met.add(pipe)
        return call(pipe, *args, **kwargs)

    return with_recipe


def _recipe_of(source: str) -> Path:
    """The recipe of a folder or hub id ("owner/name")."""
    folder = Path(source)
    if not folder.is_dir() and not folder.is_absolute() and source.count("/") == 1:
        with contextlib.suppress(OSError, ValueError):
            folder = recipe_folder(source)
    if not (folder / RECIPE_FILE).is_file():
        raise ValueError(
            f"no {RECIPE_FILE} in {source!r}, of which this pipeline was made to call with its "
            "recipe; give from_pretrained the absolute path, or load it with accel.load"
        )
    return folder / RECIPE_FILE
