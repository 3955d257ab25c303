# SPDX-License-Identifier: Apache-2.0
"""Models that propose and vary candidates: they see public and released values, never a shard."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np

from .. import __version__
from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.generation import Shown, Subject
from ..core.schema import Schema

Modality = Literal["table", "image", "text"]
_FAR = 0.5  # degree of a variation that stands for something new


@dataclass(frozen=True)
class Capabilities:
    """What a public model can do, and where it does it.

    Attributes:
      modality: The part of a record that it makes.
      sends_to: Where what it is shown goes: empty for nowhere beyond this process, else a URL.
      is_exact: The same request gives the same candidates, here and on other machines, so that
        they need not be recorded.
    """

    modality: Modality
    sends_to: str = ""
    is_exact: bool = True


@dataclass(frozen=True)
class Estimate:
    """About what some requests take.

    Attributes:
      tokens_in: Tokens that a language model reads.
      tokens_out: Tokens that it writes, at most.
      cpu_s: CPU-seconds of this machine.
      cost: Money, in the currency that prices were declared in.
    """

    tokens_in: int = 0
    tokens_out: int = 0
    cpu_s: float = 0.0
    cost: float = 0.0

    def __add__(self, other: "Estimate") -> "Estimate":
        """Both together."""
        return Estimate(
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.cpu_s + other.cpu_s,
            self.cost + other.cost,
        )


class VariationModel(ABC):
    """A public model: proposes one part of records from nothing, and varies it.

    A frozen dataclass whose fields are its settings. It is found by the entry points
    `fedsynth.models`.

    Privacy:
      None is spent, whatever it does: `Candidates` hold public and released values only, and no
      type of private records can be handed to it. What it is shown may still be worth keeping to
      oneself until the release is out; `capabilities().sends_to` says where it goes.
    """

    name: ClassVar[str]

    @abstractmethod
    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """`blank` with this model's part filled in at random; labels in `blank` are kept.

        Args:
          blank: As many candidates as are wanted, with codes and without this model's part.
          subject: What they are of.
          rng: Public randomness.

        Raises:
          ConfigError: The model cannot make records of this schema.
        """

    @abstractmethod
    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """Each candidate changed in this model's part, in the same order.

        Args:
          candidates: What to start from.
          degree: How far, from 0 (not at all) to 1 (as far as it goes).
          subject: What they are of.
          rng: Public randomness.
        """

    def expand(
        self, blank: Candidates, shown: Shown, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """`blank` filled in with new ones of the examples' kind; labels in `blank` are kept.

        Here a far variation of the first example of each, but for `blank`'s columns; a model that
        learns from examples does better.

        Args:
          blank: As many candidates as are wanted, with codes and without this model's part.
          shown: The examples.
          subject: What they are of.
          rng: Public randomness.
        """
        first = replace(shown.examples.take(shown.index[:, 0]), codes=blank.codes)
        return self.vary(first, _FAR, subject, rng)

    def check(self, subject: Subject) -> None:
        """Refuse, before anything is spent, what the model cannot make.

        Raises:
          ConfigError: Something it needs is not there.
        """
        makes = self.capabilities().modality
        if makes != "table" and getattr(subject.schema, makes) is None:
            raise ConfigError(f"model {self.name!r} makes {makes}s, and the schema holds none")

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it makes, and where."""

    def kept_in(self, folder: Path) -> Self:
        """The same model, which keeps in a folder what must not be asked for twice; most do not."""
        return self

    def estimate(self, num_candidates: int, subject: Subject) -> Estimate:
        """About what proposing or varying so many candidates takes; nothing, if it is quick."""
        return Estimate()

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of all that its candidates depend on.

        Here of its name, its settings and this package's version; a model with weights adds them.
        """
        settings = dataclasses.asdict(self)  # type: ignore[call-overload]
        facts = json.dumps([__version__, self.name, settings], sort_keys=True, default=repr)
        return hashlib.sha256(facts.encode()).hexdigest()


def image_shape(schema: Schema) -> tuple[int, int, int]:
    """Height, width and channels of the schema's images.

    Raises:
      ConfigError: It has no image column.
    """
    if schema.image is None:
        raise ConfigError("this model makes images, and the schema has no image column")
    return schema.image.shape
