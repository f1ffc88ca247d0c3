"""Failures are sorted into what is worth another attempt and what stops the render."""

import errno
import sqlite3

import pytest
import torch

from apps.render.faults import InvalidJob, NotFinite, StorageFault, classify, storage_reason

CASES = [
    (InvalidJob("no such argument"), "invalid", False),
    (ValueError("height must be divisible by 8"), "invalid", False),
    (TypeError("unexpected keyword"), "invalid", False),
    (NotFinite("nan"), "nan", False),
    (MemoryError(), "memory", True),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "memory", True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPU"), "memory", True),
    (OSError(errno.EIO, "Input/output error"), "transient", True),
    (TimeoutError(), "transient", True),
    (RuntimeError("boom"), "unknown", True),
    (OSError(errno.ENOSPC, "No space left on device"), "storage", False),
    (sqlite3.OperationalError("database or disk is full"), "storage", False),
    (sqlite3.OperationalError("disk I/O error"), "storage", False),
    (StorageFault("gone"), "storage", False),
]


@pytest.mark.parametrize(("error", "expected", "again"), CASES, ids=lambda v: str(v)[:20])
def test_classes(error, expected, again):
    fault = classify(error)
    assert fault.error_class == expected
    assert fault.worth_another(1) is again
    assert not fault.worth_another(3)
    assert fault.stop is (expected == "storage")
    assert "\n" not in fault.message


def test_what_a_person_is_told():
    assert storage_reason(OSError(errno.ENOSPC, "x")) == "the disk is full"
    assert "the disk is full, or" in storage_reason(sqlite3.OperationalError("disk I/O error"))
    assert "cannot be written" in storage_reason(PermissionError(errno.EACCES, "denied"))
    assert "line one line two" in classify(RuntimeError("line one\n  line two")).message
