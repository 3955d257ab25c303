# SPDX-License-Identifier: Apache-2.0
"""Ask public models for whole candidates: columns here, images and texts of a model by name."""

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...core.candidates import Candidates
from ...core.embedding import EMBEDDER
from ...core.generation import PLACES, Generation, Shown, Subject
from ...core.schema import Schema
from ...models.live import make
from ...models.registry import build_model, canonical
from ...models.table import TableMutator
from ...models.variation import Modality


@dataclass(frozen=True)
class Breeder:
    """What proposes and varies whole records: the table's columns here, the rest by a model.

    Attributes:
      subject: What candidates are of.
      table: For their columns; `None` where there are none besides the label.
      model: Name of the model of their images or texts; of a table: its own.
      settings: Its settings, as canonical JSON.
      is_exact: Its candidates come out the same again, and need not be recorded.
      embedder: Name of the embedder, or empty.
      embedder_settings: Its settings, as canonical JSON.
      lookahead: Variations whose mean embedding stands for a candidate.
    """

    subject: Subject
    table: TableMutator | None
    model: str
    settings: str
    is_exact: bool
    embedder: str
    embedder_settings: str
    lookahead: int

    @staticmethod
    def of(
        subject: Subject,
        shares: Sequence[NDArray[np.float64]] | None,
        *,
        model: str,
        settings: Mapping[str, Any],
        embedder: str,
        embedder_settings: Mapping[str, Any],
        lookahead: int,
    ) -> "Breeder":
        """What a strategy's settings call for.

        Args:
          subject: What candidates are of.
          shares: From which each column of a table is drawn; `None`: all cells alike.
          model: Name of the model of images or texts, or of the table's.
          settings: Its settings.
          embedder: Name of the embedder, or empty.
          embedder_settings: Its settings.
          lookahead: Variations whose mean embedding stands for a candidate.
        """
        others = len(subject.schema.columns) > (subject.label >= 0)
        return Breeder(
            subject,
            TableMutator(tuple(tuple(p.tolist()) for p in shares or ())) if others else None,
            model,
            canonical(settings),
            build_model(model, settings).capabilities().is_exact and not embedder,
            embedder,
            canonical(embedder_settings),
            lookahead,
        )

    def asked(
        self,
        task: Literal["random", "vary"],
        candidates: Candidates,
        degree: float,
        next_degree: float,
        rng: np.random.Generator,
    ) -> Generator[Generation, Any, Candidates]:
        """Candidates proposed or varied, in all their parts."""
        if self.table is not None and task == "random":
            candidates = self.table.random(candidates, self.subject, rng)
        elif self.table is not None:
            candidates = self.table.vary(candidates, degree, self.subject, rng)
        if modality_of(self.subject.schema) == "table":
            return candidates
        request = Generation(
            model=self.model,
            settings=self.settings,
            task=task,
            candidates=replace(candidates, extras=without_places(candidates.extras)),
            degree=degree,
            subject=self.subject,
            seed=int(rng.integers(1 << 62)),
            embedder=self.embedder,
            embedder_settings=self.embedder_settings,
            lookahead=self.lookahead,
            lookahead_degree=next_degree,
        )
        if self.is_exact:
            return make(request)
        made: Candidates = yield request
        return made

    def expanded(
        self, blank: Candidates, shown: Shown, rng: np.random.Generator
    ) -> Generator[Generation, Any, Candidates]:
        """New candidates after examples, not placed, for nobody votes on them."""
        examples = replace(shown.examples, extras=without_places(shown.examples.extras))
        request = Generation(
            model=self.model,
            settings=self.settings,
            task="expand",
            candidates=blank,
            degree=0.0,
            subject=self.subject,
            seed=int(rng.integers(1 << 62)),
            shown=replace(shown, examples=examples),
        )
        if build_model(self.model, json.loads(self.settings)).capabilities().is_exact:
            return make(request)
        made: Candidates = yield request
        return made


def proposed(
    model: str,
    settings: Mapping[str, Any],
    blank: Candidates,
    subject: Subject,
    rng: np.random.Generator,
    *,
    embedder: str = "",
    embedder_settings: Mapping[str, Any] | None = None,
) -> Generation:
    """The request that a model fill candidates in from nothing.

    Args:
      model: Its name.
      settings: Its settings.
      blank: As many candidates as are wanted.
      subject: What they are of.
      rng: Public randomness.
      embedder: Name of what places them; empty: nothing does.
      embedder_settings: Its settings.
    """
    return Generation(
        model=model,
        settings=canonical(settings),
        task="random",
        candidates=blank,
        degree=0.0,
        subject=subject,
        seed=int(rng.integers(1 << 62)),
        embedder=embedder,
        embedder_settings=canonical(embedder_settings or {}),
    )


def modality_of(schema: Schema) -> Modality:
    """What a public model is to make of the records."""
    if schema.image is not None:
        return "image"
    return "table" if schema.text is None else "text"


def without_places(extras: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All extras but embeddings, which are sent to clients and made anew."""
    return {name: rows for name, rows in extras.items() if name not in (PLACES, EMBEDDER)}
