# SPDX-License-Identifier: Apache-2.0
"""Texts by a language model, as Private Evolution asks for them: random ones and variations."""

import copy
import hashlib
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.generation import Shown, Subject
from ..core.open_codes import cut_text
from ..core.plugins import build, installed
from ..core.texts import as_texts
from .language import LanguageModel, Prompt
from .replies import Replies
from .variation import Capabilities, Estimate, VariationModel
from .writer import Brief, Counts, Writer

LANGUAGES = {
    "llama": "models.llama:LlamaCpp",
    "endpoint": "models.endpoint:Endpoint",
    "transformers": "models.transformer:Transformers",
}
_LABEL = "{label}"
_REPLIES = "replies.db"
_TOKENS_A_WORD = 2
_TURNS = 120  # tokens of the turns before a prompt, of which a model reads most once
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextWriter(VariationModel):
    """Has a language model write texts from a public brief, and vary them.

    Attributes:
      about: What the texts are, in the plural, as in "short messages in a technical chat room".
        `{label}` in it stands for the category that a text is to be of.
      examples: Public texts of the kind; a small model needs six or more.
      topics: What the texts may be about, public.
      tones: Moods they may be in; empty: common ones.
      max_words: Of the longest text.
      language: The language model: `llama` (llama.cpp in this process), `endpoint` (any that
        speaks OpenAI's protocol), `transformers` (a local folder), or one that is installed.
      language_settings: Its settings.
      fill_in_share: Of variations that fill in blanks; the others are paraphrases.
      blanks: Where blanks are: at the `end`, which a small model fills well, or `anywhere`.
      temperature: Of sampling.
      top_p: Of sampling.
    """

    about: str = ""
    examples: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    tones: tuple[str, ...] = ()
    max_words: int = 40
    language: str = "llama"
    language_settings: dict[str, Any] = field(default_factory=dict)
    fill_in_share: float = 0.5
    blanks: Literal["end", "anywhere"] = "end"
    temperature: float = 0.9
    top_p: float = 0.9
    name: ClassVar[str] = "writer"

    def __post_init__(self) -> None:
        """Refuse settings that no text could be written by."""
        if not self.about.strip():
            raise ConfigError(
                "model 'writer' needs to know what to write: set about in model_settings, in"
                ' public words, as in about = "short messages in a technical chat room"'
            )
        self._brief("")
        if not 0 <= self.fill_in_share <= 1:
            raise ConfigError(f"fill_in_share must be from 0 to 1, not {self.fill_in_share!r}")

    def check(self, subject: Subject) -> None:
        """Refuse a schema without texts, and a language model that cannot work.

        Raises:
          ConfigError: There is no text column, no label for `{label}`, or no such model.
        """
        super().check(subject)
        if _LABEL in self.about and subject.label < 0:
            raise ConfigError(f"about holds {_LABEL}, and there is no label: leave it out")
        self._model()

    def capabilities(self) -> Capabilities:
        """Texts, wherever the language model is; what it says differs from time to time."""
        return replace(self._model().capabilities(), modality="text", is_exact=False)

    def estimate(self, num_candidates: int, subject: Subject) -> Estimate:
        """About what so many texts take: one reply each, some of them two."""
        prompt = Prompt("x" * 4 * _TURNS, max_tokens=_TOKENS_A_WORD * self.max_words)
        return self._model().estimate([prompt] * num_candidates)

    def fingerprint(self) -> str:
        """Of the settings and of the language model's weights."""
        return _joined(super().fingerprint(), self._model().fingerprint())

    def kept_in(self, folder: Path) -> Self:
        """The same writer, which keeps replies in a folder and asks for none of them twice."""
        kept = copy.copy(self)
        object.__setattr__(kept, "_folder", folder)
        return kept

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """A new text each."""
        texts, counts = as_texts([""] * len(blank)), Counts()
        with self._replies() as replies:
            for members, writer in self._writers(blank, subject, replies):
                written = writer.random_texts(len(members), rng)
                texts[members] = written.texts
                counts += written.counts
        return self._done(blank, texts, counts, subject)

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """A paraphrase of each text, or the text with words filled in anew."""
        if candidates.texts is None:
            raise ConfigError("model 'writer' varies texts, and these candidates have none")
        texts, counts = candidates.texts.copy(), Counts()
        with self._replies() as replies:
            for members, writer in self._writers(candidates, subject, replies):
                written = writer.vary(texts[members].tolist(), degree, rng)
                texts[members] = written.texts
                counts += written.counts
        return self._done(candidates, texts, counts, subject)

    def expand(
        self, blank: Candidates, shown: Shown, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """A new text each, written after the examples that it is shown."""
        if shown.examples.texts is None:
            raise ConfigError("model 'writer' is shown texts, and these examples have none")
        examples = shown.examples.texts.tolist()
        texts, counts = as_texts([""] * len(blank)), Counts()
        with self._replies() as replies:
            for members, writer in self._writers(blank, subject, replies):
                written = writer.expand(examples, shown.index[members], rng)
                texts[members] = written.texts
                counts += written.counts
        return self._done(blank, texts, counts, subject)

    def _writers(
        self, candidates: Candidates, subject: Subject, replies: Replies
    ) -> Iterator[tuple[NDArray[np.int64], Writer]]:
        """Candidates that are written by one brief, and who writes them."""
        labels = np.zeros(len(candidates), dtype=np.int64)
        names = [""]
        if subject.label >= 0 and _LABEL in self.about:
            labels = candidates.codes[:, subject.label].astype(np.int64)
            column = subject.schema.columns[subject.label]
            names = [*column.categories, "other"]
        for label in np.unique(labels):
            writer = Writer(
                self._model(),
                replies,
                self._brief(names[label]),
                fill_in_share=self.fill_in_share,
                blanks=self.blanks,
                temperature=self.temperature,
                top_p=self.top_p,
            )
            yield np.flatnonzero(labels == label), writer

    def _done(
        self, candidates: Candidates, texts: NDArray[np.object_], counts: Counts, subject: Subject
    ) -> Candidates:
        """Candidates with these texts, none longer than the schema's."""
        _log.info("%s: %s", self.language, counts)
        most = 1000 if subject.schema.text is None else subject.schema.text.max_bytes
        return replace(candidates, texts=as_texts(cut_text(text, most) for text in texts))

    def _replies(self) -> "closing[Replies]":
        """Where replies are kept."""
        folder: Path | None = getattr(self, "_folder", None)
        return closing(Replies(None if folder is None else folder / _REPLIES))

    def _brief(self, label: str) -> Brief:
        """What texts of a label should be."""
        about = self.about.replace(_LABEL, label)
        return Brief(about, self.examples, self.topics, self.tones, self.max_words)

    def _model(self) -> LanguageModel:
        """The language model."""
        kind = installed(
            "language model",
            self.language,
            LANGUAGES,
            "fedsynth.languages",
            LanguageModel,  # type: ignore[type-abstract]
        )
        return build(kind, self.language_settings, f"language model {self.language!r}")


def _joined(*digests: str) -> str:
    """One digest of several."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
