"""What can go wrong in one job, what is worth another attempt, and what stops the whole render."""

from __future__ import annotations

import errno
import sqlite3
from dataclasses import dataclass
from typing import Any

# How many attempts each class of failure is worth.
ATTEMPTS = {
    "invalid": 1,  # the job asks for what the pipeline cannot do; asking again changes nothing
    "nan": 1,  # the unaccelerated pipeline was tried already
    "memory": 2,
    "unknown": 2,
    "transient": 3,
    "lost": 3,  # its worker process died
}
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_STORAGE_WORDS = ("disk is full", "disk I/O error", "readonly database", "unable to open database")
_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_cpu")


class InvalidJob(ValueError):
    """The job is well formed, but this pipeline or recipe cannot do it."""


class NotFinite(ArithmeticError):
    """NaN or infinity in the output, without acceleration too."""


class Stopped(BaseException):
    """The render is asked to end; raised between two steps. Not an error of the job."""


class JobCancelled(Stopped):
    """A person cancelled this job while it was running."""


class StorageFault(OSError):
    """The output folder cannot be written (full, read-only, gone). Stops the render.

    Attributes:
        started: whether the render had begun; if not, nothing at all was changed.
    """

    started = False


class WorkersDie(RuntimeError):
    """Worker processes die before they take any work. Stops the render."""


@dataclass(frozen=True)
class Fault:
    """A classified failure. `stop` ends the render instead of trying the next job."""

    error_class: str
    message: str
    stop: bool = False

    def worth_another(self, attempts: int) -> bool:
        """Whether a task that has been tried `attempts` times should be tried again."""
        return attempts < ATTEMPTS.get(self.error_class, 1)

    def as_json(self) -> dict[str, Any]:
        return {"error_class": self.error_class, "message": self.message, "stop": self.stop}


def classify(error: BaseException) -> Fault:
    """Sort an exception into a Fault with a one-line message."""
    message = _one_line(error)
    if is_storage(error):
        return Fault("storage", message, stop=True)
    if isinstance(error, InvalidJob):
        return Fault("invalid", message)
    if isinstance(error, NotFinite):
        return Fault("nan", message)
    if _is_memory(error):
        return Fault("memory", message)
    if isinstance(error, (OSError, TimeoutError)):
        return Fault("transient", message)
    if isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return Fault("invalid", message)
    return Fault("unknown", message)


def is_storage(error: BaseException) -> bool:
    """True when no job can succeed before a person has freed or unlocked the disk."""
    if isinstance(error, StorageFault):
        return True
    if isinstance(error, sqlite3.OperationalError):
        return any(words in str(error) for words in _STORAGE_WORDS)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def storage_reason(error: BaseException) -> str:
    """What to tell a person whose output folder cannot be written."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error):
        return "the disk is full"
    if "disk I/O error" in str(error):  # SQLite's word for a full disk, too, where it shares memory
        return "the disk is full, or fails (disk I/O error)"
    if number in _STORAGE:
        return f"cannot be written ({_one_line(error)})"
    return _one_line(error)


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _MEMORY_WORDS)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, (InvalidJob, NotFinite, StorageFault)) and text:
        return text[:500]
    return f"{name}: {text}"[:500] if text else name
