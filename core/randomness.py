# SPDX-License-Identifier: Apache-2.0
"""Secret randomness: ChaCha20 streams from the operating system's entropy, and what is drawn.

Noise and sampling coins come from here and from nowhere else.
"""

import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

_CHUNK = 1 << 20  # bytes of key stream taken at a time


class KeyStream(Protocol):
    """A source of uniform random bytes.

    `is_secret` says whether nobody can predict it. Only `OsKeyStream` is; tests bring their own,
    and a run that used one is marked as not private.
    """

    is_secret: bool

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes."""
        ...


class OsKeyStream:
    """ChaCha20 key streams, each read under a fresh key from `os.urandom`; never seeded.

    It keeps no state, so two processes, a forked child among them, or a machine that is restored
    from a snapshot, never share a stream.
    """

    is_secret = True

    def read(self, num_bytes: int) -> bytes:
        """`num_bytes` bytes of a stream that nobody has read before."""
        nonce = bytes(16)  # a key serves one read, so a fixed nonce never repeats under it
        cipher = Cipher(algorithms.ChaCha20(os.urandom(32), nonce), mode=None)
        return cipher.encryptor().update(bytes(num_bytes))


def uniform_words(size: int, stream: KeyStream) -> NDArray[np.uint64]:
    """Uniform 64-bit words, `(size,)`."""
    return np.frombuffer(stream.read(8 * size), dtype="<u8")


def coins(size: int, prob: float, stream: KeyStream) -> NDArray[np.bool_]:
    """Independent coins that are true with probability `prob`, `(size,)`.

    The probability is exact down to 2^-53 and never above `prob`.
    """
    if prob >= 1:
        return np.ones(size, dtype=np.bool_)
    return (uniform_words(size, stream) >> np.uint64(11)) < np.uint64(int(prob * 2.0**53))


def lattice_noise(size: int, stddev: float, stream: KeyStream) -> NDArray[np.int64]:
    """Gaussian noise rounded to integers, `(size,)`.

    Args:
      size: How many.
      stddev: Standard deviation in lattice units, before rounding; at most 2^52.
      stream: Secret randomness.

    Privacy:
      For an integer vector x, x + round(g) = round(x + g): rounding is post-processing of the
      Gaussian mechanism. Box-Muller on 53-bit uniforms reaches 8.57 standard deviations; the
      mass beyond is below 1e-17 a coordinate.
    """
    noise = np.empty(size, dtype=np.int64)
    for start in range(0, size, _CHUNK // 16):
        part = noise[start : start + _CHUNK // 16]
        part[:] = np.rint(_gaussian(len(part), stream) * stddev)
    return noise


def _gaussian(size: int, stream: KeyStream) -> NDArray[np.float64]:
    """Standard normal draws by Box and Muller, `(size,)`."""
    half = (size + 1) // 2
    words = uniform_words(2 * half, stream) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((words[:half] + np.uint64(1)) * 2.0**-53))
    angle = words[half:] * (2.0 * np.pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
