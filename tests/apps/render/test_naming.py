"""Default stems are always safe, and safe stems stay inside the folder."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.render.naming import MAX_STEM_BYTES, default_stem, folded, name_problem, stem_problem

# An explicit alphabet: building hypothesis' table of all characters takes seconds.
TEXT = st.text(string.printable + "äß日\u202e\ud7ff\u0301", max_size=150)


@given(
    st.integers(0, 10**7),
    st.dictionaries(
        st.sampled_from(["prompt", "class_labels", "other"]),
        TEXT | st.lists(st.integers()) | st.lists(TEXT) | st.none(),
    ),
)
def test_default_stems_are_safe(index, inputs):
    stem = default_stem(index, "0123456789abcdef", inputs)
    assert stem_problem(stem) is None
    assert stem.endswith("01234567")


@given(TEXT)
def test_safe_stems_are_one_path_part(stem):
    if stem_problem(stem) is None:
        path = Path("/out") / f"{stem}.png"
        assert path.parent == Path("/out")
        assert path.resolve() == path
        assert len(path.name.encode()) <= MAX_STEM_BYTES + 4


@pytest.mark.parametrize("name", ["x.search", "x.candidates", "X.Curve"])
def test_a_job_is_not_called_as_the_record_of_a_search(name):
    assert "as the record of a search does" in str(name_problem(name))
    assert stem_problem(name) is None, "folders that hold one are read"


def test_names_that_a_file_system_may_confuse():
    assert folded("Straße") == folded("STRASSE")
    assert folded("e\u0301") == folded("\u00e9")


def test_stem_says_what_it_shows():
    prompt = {"prompt": "A red three, on dark!"}
    assert default_stem(7, "abcdef0123", prompt) == "0007-a-red-three-on-dark-abcdef01"
    assert default_stem(7, "abcdef0123", {"class_labels": [3, 14]}) == "0007-label-3-14-abcdef01"
