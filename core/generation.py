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

from .candidates import Candidates
from .schema import Schema

PLACES = "places"


@dataclass(frozen=True)
class Subject:
    """What candidates are of; public.

    Attributes:
      schema: Schema of the records.
      label: Column whose category a candidate is to be of, or -1.
    """

    schema: Schema
    label: int = -1


@dataclass(frozen=True)
class Generation:
    """A request to a public model.

    Attributes:
      model: Name of an installed model.
      settings: Its settings, as canonical JSON.
      task: `random`: fill the candidates in; `vary`: change each of them.
      candidates: What the model is shown. Public or released, by its type.
      degree: How far to vary, from 0 to 1; 0 for `random`.
      subject: What they are of.
      seed: Of the model's own randomness.
      embedder: Name of an installed embedder that places what was made: its embeddings, in whole
        steps, are the extra `PLACES` of the answer, and its fingerprint, 32 bytes a candidate, the
        extra `EMBEDDER`; empty: none.
      embedder_settings: Its settings, as canonical JSON.
      lookahead: Variations of each candidate whose mean embedding stands for it; 0: its own does.
      lookahead_degree: How far those vary.
    """

    model: str
    settings: str
    task: Literal["random", "vary"]
    candidates: Candidates
    degree: float
    subject: Subject
    seed: int
    embedder: str = ""
    embedder_settings: str = "{}"
    lookahead: int = 0
    lookahead_degree: float = 0.0

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
        for name, array in sorted(self.candidates.tensors().items()):
            digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()
