# SPDX-License-Identifier: Apache-2.0
"""Codes of open columns keep all that a later question may ask of a value."""

import numpy as np
from fedsynth.core.open_codes import (
    MISSING_NUMBER,
    bytes_of,
    cut_text,
    number_codes,
    single,
    text_of,
    text_words,
)
from hypothesis import given
from hypothesis import strategies as st

FLOATS = st.floats(allow_nan=False)


@given(FLOATS, FLOATS)
def test_codes_are_in_the_order_of_their_numbers(one, other):
    low, high = number_codes(np.array(sorted([one, other])))

    assert low <= high


@given(FLOATS, st.floats(allow_nan=False, width=32))
def test_a_code_lies_on_its_numbers_side_of_an_edge(value, edge):
    code, at = number_codes(np.array([value, edge]))

    assert (code >= at) == (value >= edge)


@given(st.floats(allow_nan=False, width=32), st.floats(allow_nan=False, width=32))
def test_numbers_of_single_precision_share_a_code_only_if_they_are_equal(one, other):
    first, second = number_codes(np.array([one, other]))

    assert (first == second) == (one == other)


def test_a_missing_number_is_below_all_others():
    codes = number_codes(np.array([np.nan, -np.inf]))

    assert codes.tolist()[0] == MISSING_NUMBER < codes.tolist()[1]


def test_single_precision_edges_stay_where_they_are():
    edges = single(np.array([0.1, 1.5, 1e9 + 1]))

    assert (single(edges) == edges).all()


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_a_text_that_fits_is_read_back(text):
    words = text_words([text], 80)

    assert words.shape == (1, 20)
    assert bytes_of(words)[0].tobytes().rstrip(b"\0").decode() == text


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30), st.integers(1, 40))
def test_a_text_is_cut_between_characters(text, max_bytes):
    cut = cut_text(text, max_bytes)

    assert text.startswith(cut)
    assert len(cut.encode()) <= max_bytes
    rest = text[len(cut) :]
    assert not rest or len((cut + rest[0]).encode()) > max_bytes


def test_bytes_that_spell_no_printable_text_are_no_text():
    assert text_of(b"caf\xc3\xa9\0\0") == "café"
    assert text_of(b"caf\xc3\0") is None
    assert text_of(b"a\x07b") is None
    assert text_of(b"\0\0") is None
