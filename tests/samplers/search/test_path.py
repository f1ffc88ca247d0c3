import pytest

from samplers.search.path import (
    Draw,
    Renoise,
    Rotate,
    Run,
    Turn,
    digest,
    finished,
    is_plain,
    path_json,
    read_path,
    step_of,
)

PATHS = [
    (Draw(3),),
    (Draw(3), Turn(4, 0.95), Run()),
    (Draw(3), Run(5, 1.0, 7), Renoise(2, 9), Run(6, 0.0), Rotate(1, 0.2), Run(None, 0.5, 8)),
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_json(path):
    assert read_path(path_json(path)) == path


@pytest.mark.parametrize(
    "value",
    [
        [], {}, None, [{"draw": {"key": -1}}], [{"draw": {"key": True}}], [{"run": {}}],
        [{"draw": {"key": 1}}, {"draw": {"key": 2}}], [{"draw": {"key": 1}}, {"exec": {"key": 2}}],
        [{"draw": {"key": 1}}, {"turn": {"key": 1, "cosine": 2.0}}],
        [{"draw": {"key": 1}}, {"turn": {"key": 1}}],
        [{"draw": {"key": 1}}, {"run": {"to": 3, "more": 1}}],
        [{"draw": {"key": 1}}, {"run": {"to": 3}}, {"turn": {"key": 1, "cosine": 0.5}}],
        [{"draw": {"key": 1}}, {"renoise": {"to": 0, "key": 1}}],
        [{"draw": {"key": 1}}, {"run": {}}, {"run": {}}],
        [{"draw": {"key": 2**63}}], [{"draw": {"key": 1}, "run": {}}], ["draw"],
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused(value):
    with pytest.raises(ValueError, match=r"path|move|turned|renoised|follows"):
        read_path(value)


def test_finished_plain_and_step():
    assert finished(PATHS[0]) == (Draw(3), Run())
    assert finished(PATHS[2]) == PATHS[2]
    assert is_plain(finished(PATHS[0]))
    assert not is_plain(PATHS[1])
    assert [step_of(p) for p in ((Draw(1),), (Draw(1), Run(4)), PATHS[1])] == [0, 4, None]


def test_digests_tell_paths_apart():
    found = {digest(p) for p in PATHS} | {digest(PATHS), digest(PATHS, "render")}
    assert len(found) == len(PATHS) + 2
