# SPDX-License-Identifier: Apache-2.0
"""Texts without a language model: a bag of public words, shuffled; and embeddings by hashing.

For tests, for devices that hold no model, and as the floor that a language model is measured by.
Nobody will take these texts for language.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.embedding import Embedder
from ..core.errors import ConfigError
from ..core.generation import Lesson, Subject
from ..core.texts import as_texts
from .variation import Capabilities, VariationModel

_COMMON = (
    "the of and a to in is you that it he was for on are as with his they I at be this have from"
    " or one had by word but not what all were we when your can said there use an each which she"
    " do how their if will up other about out many then them these so some her would make like"
    " him into time has look two more write go see number no way could people my than first water"
    " been call who oil its now find long down day did get come made may part"
)
_VERSION = 1  # of what the embeddings depend on
_GRAM = 3
_ODDS = 1 << 20  # of a word that no lesson speaks of


@dataclass(frozen=True)
class Words(VariationModel):
    """Draws words of a public list; varies a text by dropping, swapping and replacing words.

    Attributes:
      words: The public list.
      max_words: Words of the longest text that is proposed; a text is varied up to that length.
      lessons: Texts that were preferred to others: a prompt's number, which counts for nothing
        here, the one and the other. A word is drawn the more often the more often it stands in
        the first, and the less often in the second.
    """

    words: tuple[str, ...] = tuple(_COMMON.split())
    max_words: int = 12
    lessons: tuple[Lesson, ...] = ()
    name: ClassVar[str] = "words"

    def __post_init__(self) -> None:
        """Refuse a list that no text can be made of."""
        if not self.words or not 1 <= self.max_words <= 1000:
            raise ConfigError("model 'words' needs words, and max_words of 1 to 1,000")

    def capabilities(self) -> Capabilities:
        """Texts, in this process."""
        return Capabilities("text")

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """Words drawn at random."""
        counts = rng.integers(1, self.max_words + 1, len(blank))
        return replace(blank, texts=as_texts(" ".join(self._drawn(n, rng)) for n in counts))

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """Each word kept, or dropped, doubled with a new one, or replaced."""
        if candidates.texts is None:
            raise ConfigError("model 'words' varies texts, and these candidates have none")
        return replace(
            candidates, texts=as_texts(self._varied(t, degree, rng) for t in candidates.texts)
        )

    def _drawn(self, num_words: int, rng: np.random.Generator) -> list[str]:
        """So many words of the list."""
        if not self.lessons:
            return [self.words[i] for i in rng.integers(len(self.words), size=num_words)]
        ends = np.cumsum(self._odds)  # whole numbers, so the same on every machine
        drawn = rng.integers(ends[-1], size=num_words)
        return [self.words[i] for i in np.searchsorted(ends, drawn, side="right")]

    @cached_property
    def _odds(self) -> NDArray[np.int64]:
        """How often each word is drawn, by the lessons."""
        liked = Counter(word for _, best, _ in self.lessons for word in best.split())
        disliked = Counter(word for _, _, worse in self.lessons for word in worse.split())
        odds = [_ODDS * (1 + liked[word]) // (1 + disliked[word]) for word in self.words]
        return np.maximum(np.array(odds, dtype=np.int64), 1)

    def _varied(self, text: str, degree: float, rng: np.random.Generator) -> str:
        """One text varied."""
        varied: list[str] = []
        for word in text.split():
            fate = rng.random() / max(degree, 1e-12)
            if fate >= 1:
                varied.append(word)
            elif fate >= 0.25:  # otherwise it is dropped
                varied += self._drawn(1, rng) if fate < 0.75 else [word, *self._drawn(1, rng)]
        if rng.random() < degree and len(varied) > 1:
            place = int(rng.integers(len(varied) - 1))
            varied[place : place + 2] = varied[place + 1], varied[place]
        return " ".join(varied[: self.max_words] or self._drawn(1, rng))


@dataclass(frozen=True)
class WordHashes(Embedder):
    """Places a text by its words and their parts of three letters, each hashed to a signed axis.

    No weights, and exact: the same on every machine. It knows spelling, not meaning.

    Attributes:
      size: Length of an embedding.

    Reference:
      Weinberger et al. (2009), "Feature Hashing for Large Scale Multitask Learning",
      https://arxiv.org/abs/0902.2206.
    """

    size: int = 256
    name: ClassVar[str] = "word_hashes"
    modality: ClassVar[Literal["text", "image"]] = "text"

    def __post_init__(self) -> None:
        """Refuse a length that says nothing, or that a query cannot hold."""
        if not 8 <= self.size <= 4096:
            raise ConfigError(f"size must be 8 to 4,096, not {self.size!r}")

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.size

    def fingerprint(self) -> str:
        """Of the size and the version of this code."""
        return hashlib.sha256(f"word_hashes {_VERSION} {self.size}".encode()).hexdigest()

    def embed(self, records: Sequence[str] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of texts, `(num_texts, dim)`; zeros for an empty one."""
        found = np.zeros((len(records), self.size), dtype=np.float32)
        for row, text in zip(found, records, strict=True):
            for axis, sign in self._axes(str(text)):
                row[axis] += sign
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        normed: NDArray[np.float32] = found / np.maximum(lengths, 1e-12)
        return normed

    def _axes(self, text: str) -> list[tuple[int, int]]:
        """Axis and sign of each word and each part of one."""
        parts: list[str] = []
        for word in text.casefold().split():
            spelled = f" {word} "
            parts += [word, *(spelled[i : i + _GRAM] for i in range(len(spelled) - _GRAM + 1))]
        axes: list[tuple[int, int]] = []
        for part in parts:
            digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
            number = int.from_bytes(digest, "little")
            axes.append(((number >> 1) % self.size, 1 if number & 1 else -1))
        return axes
