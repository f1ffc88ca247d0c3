"""Canonical text is one text per value, and reading it gives the value back."""

import json

from hypothesis import given
from hypothesis import strategies as st

from apps.render import strict_json

TEXT = st.text('aB0 "\\\n\x00é日\U0001f600', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(VALUES)
def test_round_trip(value):
    text = strict_json.canonical(value)
    assert strict_json.loads(text.encode()) == value
    assert strict_json.canonical(strict_json.loads(text.encode())) == text


@given(st.dictionaries(TEXT, VALUES, max_size=5), st.randoms())
def test_order_of_keys_does_not_matter(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert strict_json.canonical(dict(items)) == strict_json.canonical(value)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_value_or_one_line(raw):
    try:
        value = strict_json.loads(raw)
    except ValueError as error:
        value, reason = None, str(error)
        assert "\n" not in reason
    else:
        assert json.loads(raw) == value
