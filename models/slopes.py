# SPDX-License-Identifier: Apache-2.0
"""Slopes of adapters at many texts at once, where no text's bits depend on another.

A layer's weights are read from memory once for a chunk of texts, and not once for each. A product
may round a row by where it stands, so chunks have few fixed shapes, and before a shape is used in a
process it is tried on made-up texts: one of them must come out the same to the last bit at every
place, whoever stands at the others, and so it must in smaller chunks, which are for fewer texts.
Where that does not hold, a chunk is one text.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .lora import Adapters, Frozen
from .one_core import one_core

_NEEDED_BY = "a language model that users tune"
_SHORTEST = 8  # tokens of a row, doubled until the text fits
_TOGETHER = 512  # tokens of a chunk

Tokens = tuple[int, ...]


def slopes_of(
    model: Frozen, prompts: Sequence[str], texts: Sequence[Tokens], adapters: Adapters, first: int
) -> NDArray[np.float32]:
    """The slope of each text's mean surprise in all adapters, `(num_texts, num_weights)`.

    Each is told by that text, its prompt and the adapters alone, to the last bit.

    Args:
      model: What the adapters stand beside.
      prompts: What each text follows; few different ones.
      texts: Tokens of each.
      adapters: As they stand, `(outputs, rank)`.
      first: The first adapted layer.
    """
    width = sum(learned.numel() for _, learned, _ in adapters.values())
    rows = np.zeros((len(texts), width), dtype=np.float32)
    with one_core(_NEEDED_BY, learns=True) as torch:
        for (prompt, length), members in _kinds(prompts, texts).items():
            chunk = _Chunk(torch, model, prompt, adapters, first, length)
            for some in chunk.parts(members):
                rows[some] = chunk.slopes_of([texts[i] for i in some])
    return rows


def guesses_of(
    model: Frozen, prompts: Sequence[str], texts: Sequence[Tokens], adapters: Adapters, first: int
) -> NDArray[np.float64]:
    """Tokens guessed right, all of them, and their surprise in sum, `(num_texts, 3)`.

    The end of a text counts as a token of it. Last bits may hang on other texts.
    """
    found = np.zeros((len(texts), 3))
    with one_core(_NEEDED_BY, learns=True) as torch, torch.no_grad():
        for (prompt, length), members in _kinds(prompts, texts).items():
            most = max(1, _TOGETHER // length)
            for start in range(0, len(members), most):
                some = members[start : start + most]
                own = [texts[i] for i in some]
                states = model.beneath(prompt, own, first, length, kept_for="guesses")
                lost, right, told = model.surprises(prompt, own, states, adapters, first)
                for column, part in enumerate((right, told, lost.double())):
                    found[some, column] = (part * told).sum(-1).numpy()
    return found


def _kinds(prompts: Sequence[str], texts: Sequence[Tokens]) -> dict[tuple[str, int], list[int]]:
    """Which texts follow a prompt and fit into a row of a length."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        kinds.setdefault((prompt, _length(text)), []).append(i)
    return kinds


def _length(text: Tokens) -> int:
    """Tokens of a row that holds a text and its end."""
    length = _SHORTEST
    while length < len(text) + 1:
        length *= 2
    return length


class _Chunk:
    """Texts of one shape, after one prompt."""

    def __init__(
        self, torch: Any, model: Frozen, prompt: str, adapters: Adapters, first: int, length: int
    ) -> None:
        self._torch, self._model, self._prompt = torch, model, prompt
        self._adapters, self._first, self._length = adapters, first, length
        shapes = tuple((name, tuple(part.shape)) for name, (_, part, _) in adapters.items())
        key = (prompt, shapes, first, length)
        if key not in model.tried:
            model.tried[key] = self._agree(max(1, _TOGETHER // length))
        self._sizes = model.tried[key]

    def parts(self, members: Sequence[int]) -> Iterator[list[int]]:
        """So many at a time as a chunk has places."""
        most = self._sizes[-1]
        for start in range(0, len(members), most):
            yield list(members[start : start + most])

    def slopes_of(self, texts: Sequence[Tokens]) -> NDArray[np.float32]:
        """The slope of each of them, at most as many as a chunk has places."""
        room = next(size for size in self._sizes if size >= len(texts))
        filled = [texts[i % len(texts)] for i in range(room)]
        return self._slopes(filled, kept_for=self._sizes)[: len(texts)]

    def _slopes(
        self, texts: Sequence[Tokens], *, kept_for: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        """The slope of each text of a full chunk."""
        torch = self._torch
        own = {
            name: (
                first,
                learned.detach().expand(len(texts), -1, -1).clone().requires_grad_(),
                last,
            )
            for name, (first, learned, last) in self._adapters.items()
        }
        states = self._model.beneath(
            self._prompt, texts, self._first, self._length, kept_for=kept_for
        )
        lost, _, told = self._model.surprises(self._prompt, texts, states, own, self._first)
        lost = ((lost * told).sum(-1) / told.sum(-1)).sum()
        slopes = torch.autograd.grad(lost, [learned for _, learned, _ in own.values()])
        found: NDArray[np.float32] = torch.cat([slope.flatten(1) for slope in slopes], 1).numpy()
        return found

    def _agree(self, most: int) -> tuple[int, ...]:
        """Sizes of chunks in which a made-up text has one slope at all places; else 1 alone."""
        rng, model = np.random.default_rng(0), self._model

        def made_up() -> Tokens:
            size = self._length - 1 - int(rng.integers(self._length // 2))
            return tuple(rng.integers(model.num_words, size=size).tolist())

        one = made_up()
        expected = self._slopes([one] * most)
        if not (expected == expected[0]).all():
            return (1,)
        is_one = rng.random(most) < 0.5
        for held in (is_one, ~is_one):
            found = self._slopes([one if mine else made_up() for mine in held])
            if not (found[held] == expected[0]).all():
                return (1,)
        sizes = [most]
        while most > 1:
            most //= 2
            if (self._slopes([one] * most) == expected[0]).all():
                sizes.append(most)
        return tuple(sorted(sizes))
