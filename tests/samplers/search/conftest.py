"""One small pipeline for all searches, and a verifier that counts."""

from __future__ import annotations

import pytest

from accel.testing import tiny
from samplers.search.verifiers.pixels import Brightness


class Counting(Brightness):
    """Brightness, and how many samples were scored in this process."""

    def __init__(self):
        self.samples = 0

    def score(self, samples, prompts):
        self.samples += len(samples)
        return super().score(samples, prompts)


@pytest.fixture
def host():
    return tiny("sd")


@pytest.fixture
def call(host):
    return {k: v for k, v in host.inputs.items() if k != "output_type"}


@pytest.fixture
def counting():
    return Counting()
