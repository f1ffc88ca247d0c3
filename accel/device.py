"""The current device, and random numbers on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one inside the ``with`` block.

    Triton launches on the current device and stream wherever its tensors are, and Accelerate trains
    there; torch's own operators see to it themselves.
    """
    if device.type == "cpu":
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def forked_rng() -> AbstractContextManager[None]:
    """What is drawn inside the ``with`` block leaves the global generators as they were.

    Those of every GPU, too, of which torch's own function warns where there are several.
    """
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type not in ("cuda", "xpu"):
        return torch.random.fork_rng(devices=[])
    every = range(torch.accelerator.device_count())
    return torch.random.fork_rng(every, device_type=kind.type)


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """``forked_rng`` that begins with this seed.

    Around a pipeline call: a stochastic scheduler that its pipeline gives no generator (DiT, every
    flow pipeline) draws from the global ones, and the same call must give the same.
    """
    with forked_rng():
        torch.manual_seed(seed)
        yield
