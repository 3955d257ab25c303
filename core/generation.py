# SPDX-License-Identifier: Apache-2.0
"""What a strategy asks of a public model.

A strategy's rounds have no input or output of their own, and a language model's do not repeat. So
a strategy yields a `Generation` as it yields a query, and whoever drives it hands back candidates:
a run asks the model and keeps what it said, a replay takes what was kept.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .candidates import Candidates
from .errors import ConfigError
from .schema import Schema

PLACES = "places"

PROMPTS = "prompts"
"""Extra of candidates that answer prompts: which of a brief's prompts each answers."""

Lesson = tuple[int, str, str]
"""A prompt's number, the reply that was preferred, and the one that was not."""
Task = Literal["random", "vary", "expand"]


@dataclass(frozen=True)
class Subject:
    """What candidates are of; public.

    Attributes:
      schema: Schema of the records.
      label: Column whose category a candidate is to be of, or -1.
    """

    schema: Schema
    label: int = -1


@dataclass(frozen=True, eq=False)
class Shown:
    """Examples that a model is shown when it makes something new.

    Attributes:
      examples: Public or released candidates; one at least.
      index: Which of them each new candidate is made after, `(num_candidates, num_shown)`, int64;
        those of its own label. One may stand there twice.
    """

    examples: Candidates
    index: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Refuse positions that are none."""
        if not (
            self.index.ndim == 2
            and self.index.dtype == np.int64
            and self.index.shape[1] >= 1
            and ((self.index >= 0) & (self.index < len(self.examples))).all()
        ):
            raise ConfigError("examples are shown by their positions, one or more to a candidate")


@dataclass(frozen=True)
class Generation:
    """A request to a public model.

    Attributes:
      model: Name of an installed model.
      settings: Its settings, as canonical JSON.
      task: `random`: fill the candidates in; `vary`: change each of them; `expand`: fill them in
        after examples.
      candidates: What the model is shown. Public or released, by its type.
      degree: How far to vary, from 0 to 1; 0 for `random` and `expand`.
      subject: What they are of.
      seed: Of the model's own randomness.
      embedder: Name of an installed embedder that places what was made: its embeddings, in whole
        steps, are the extra `PLACES` of the answer, and its fingerprint, 32 bytes a candidate, the
        extra `EMBEDDER`; empty: none.
      embedder_settings: Its settings, as canonical JSON.
      lookahead: Variations of each candidate whose mean embedding stands for it; 0: its own does.
      lookahead_degree: How far those vary.
      shown: The examples of `expand`; `None` for other tasks.
    """

    model: str
    settings: str
    task: Task
    candidates: Candidates
    degree: float
    subject: Subject
    seed: int
    embedder: str = ""
    embedder_settings: str = "{}"
    lookahead: int = 0
    lookahead_degree: float = 0.0
    shown: Shown | None = None

    def __post_init__(self) -> None:
        """Refuse an expansion without examples for each, and examples for anything else."""
        given = 0 if self.shown is None else len(self.shown.index)
        if (self.task == "expand") != (self.shown is not None) or given not in (
            0,
            len(self.candidates),
        ):
            raise ConfigError("an expansion needs examples for each candidate; nothing else does")

    @property
    def digest(self) -> str:
        """SHA-256 of the request, by which a record is held against it."""
        digest = hashlib.sha256()
        facts = (
            *(self.model, self.settings, self.task, self.degree, self.seed),
            *(self.subject.schema.digest, self.subject.label),
            *(self.embedder, self.embedder_settings, self.lookahead, self.lookahead_degree),
        )
        digest.update(json.dumps(facts).encode())
        arrays = self.candidates.tensors()
        if self.shown is not None:
            examples = self.shown.examples.tensors().items()
            arrays |= {f"shown.{name}": array for name, array in examples}
            arrays["shown"] = self.shown.index
        for name, array in sorted(arrays.items()):
            digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()
