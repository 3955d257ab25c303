# SPDX-License-Identifier: Apache-2.0
"""Codes of values whose domain is not known yet: numbers in their order, texts as words.

A record of an open column must hold what any later, public question may ask of it: which of some
bins a number lies in, or whether a text is one of some values. So a number is coded by its rank
among all single-precision numbers, and a text by its first bytes.
"""

import numpy as np
from numpy.typing import NDArray

MISSING_NUMBER = np.iinfo(np.int32).min
"""Code of a missing number; every number's is above."""

_SIGN = np.int32(0x7FFFFFFF)


def number_codes(values: NDArray[np.float64]) -> NDArray[np.int32]:
    """Ranks of numbers among the single-precision ones, rounded down; `MISSING_NUMBER` for NaN.

    Rounding down keeps a number on its side of every edge that has single precision.

    Example:
      >>> codes = number_codes(np.array([-2.5, -0.0, 0.0, 1e-9, 3.0, np.inf, np.nan]))
      >>> bool((np.diff(codes[:6]) >= 0).all()), bool(codes[1] == codes[2] == 0)
      (True, True)

    Reference:
      Herf (2001), "Radix Tricks": floats in the order of their bits, http://stereopsis.com/radix.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    above = single > values
    single[above] = np.nextafter(single[above], np.float32(-np.inf))
    single[single == 0] = 0.0  # one zero
    bits = single.view(np.int32)
    return np.where(np.isnan(values), MISSING_NUMBER, np.where(bits < 0, bits ^ _SIGN, bits))


def single(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest single-precision numbers: edges by which codes and values are cut alike."""
    return values.astype(np.float32).astype(np.float64)


def text_words(texts: list[str], max_bytes: int) -> NDArray[np.int32]:
    """Texts as words of four bytes of UTF-8, filled up with zeros, `(len(texts), num_words)`.

    A text that is longer than `max_bytes` is cut after its last character that fits whole.
    """
    width = 4 * -(-max_bytes // 4)
    cut = b"".join(cut_text(text, max_bytes).encode().ljust(width, b"\0") for text in texts)
    return np.frombuffer(cut, dtype="<i4").astype(np.int32).reshape(len(texts), width // 4)


def cut_text(text: str, max_bytes: int) -> str:
    """The longest beginning of a text that fits in so many bytes of UTF-8."""
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    return encoded[:max_bytes].decode(errors="ignore")


def bytes_of(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Words as bytes, `(num_texts, 4 * num_words)`."""
    plain = np.ascontiguousarray(words, dtype="<i4")
    return plain.view(np.uint8).reshape(len(words), 4 * words.shape[1])


def text_of(encoded: bytes) -> str | None:
    """The text that bytes spell, if they spell one that a file can hold; else `None`."""
    try:
        text = encoded.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return None
    return text if text and text.isprintable() and text == text.strip() else None
