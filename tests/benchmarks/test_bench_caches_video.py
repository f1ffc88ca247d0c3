"""What is measured of the caches on video."""

from __future__ import annotations

import pytest

from accel.artifact import Artifact
from accel.tiny import tiny
from benchmarks import bench_caches_video
from benchmarks.digits_study import WAN, loaded
from caches.schedule import of_artifact


@pytest.fixture(scope="module")
def pipe():
    return loaded(WAN)


def test_every_row_has_a_name_of_its_own_and_is_made_when_asked_for(tmp_path):
    names = [name for name, _ in bench_caches_video.rows(tiny("wan").pipe, 20, tmp_path)]
    assert len(names) == len(set(names))
    assert not list(tmp_path.iterdir())


def test_the_control_computes_as_much_as_what_was_found(pipe, tmp_path):
    ours, random = (
        of_artifact(Artifact.load(method.artifact))
        for method in (
            bench_caches_video.searched(
                pipe, 20, tmp_path, bench_caches_video.CONTROLLED, shuffle=shuffle
            )
            for shuffle in (False, True)
        )
    )
    assert ours != random
    assert ours.share() == random.share()
    assert ours.rows[0] == random.rows[0] == "C"
