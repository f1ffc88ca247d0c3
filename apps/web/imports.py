"""First imports, one thread at a time.

diffusers fills its modules when they are first asked for something, and two threads of a server
that ask at once find them half filled.
"""

from __future__ import annotations

import threading

LOCK = threading.RLock()  # held while anything may be imported for the first time
_DONE = threading.Event()


def once() -> None:
    """Import what recipes can name, the first time; any thread may call this, often."""
    if _DONE.is_set():
        return
    with LOCK:
        if _DONE.is_set():
            return
        import accel  # noqa: F401
        from accel.methods import index, resolve

        for row in index():
            try:
                resolve(row["name"])
            except ValueError:
                continue  # it needs a package that is not here
        _DONE.set()
