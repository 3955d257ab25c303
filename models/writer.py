# SPDX-License-Identifier: Apache-2.0
"""Texts by prompts for Private Evolution: random ones from a public brief, and variations.

The prompts are made for the smallest of chat models, of which no instruction can be expected to be
followed. What they do follow is a conversation: a few earlier turns in which public examples are
the answers. So all requests of a block begin with the same such turns, which a local model reads
once, and differ in their last turn only. And what should stay of a text that is varied is not
asked for but given, as the opening of the reply.

Reference:
  Xie et al. (2024), "Differentially Private Synthetic Data via Foundation Model APIs 2: Text"
  (paraphrase in a random tone, fill in the blanks, adaptive lengths), arXiv 2403.01749.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError, FedsynthError
from .language import MAX_SEED, LanguageModel, Prompt, digest_of
from .replies import Replies
from .variation import Estimate

BLANK = "___"

_VERSION = 1  # of what is asked and how replies are judged
_ATTEMPTS_RANDOM = 4
_ATTEMPTS_VARY = 2
_BLOCK = 128  # prompts that begin with the same turns
_SHOWN = 6  # examples in them
_LENGTH_SPREAD = 0.3  # standard deviation of a length's logarithm, at degree one
_SLACK, _SLACK_WORDS = 2.0, 3  # a text may be so much longer than asked for
_HOTTER, _WIDER = 0.15, 0.97  # a second try that did as the first would be as useless
_TOKENS_A_WORD = 2.0
_LONGEST_WORD = 40  # in characters
_MOST_REPEATED = 0.5  # share of pairs of neighboring words that were there before
_MORE_THAN_ONE = 4  # words asked for, from which on a single one is too few
_EMPTY_HANDED = 64  # replies without one usable text before a model is given up
TONES = (
    *("plain", "friendly", "annoyed", "polite", "excited", "worried", "brief", "funny", "sad"),
    *("formal", "casual", "surprised"),
)
_LABEL = re.compile(
    r"^(?:(?:sure|certainly|of course|okay)[,.!:]+\s*)?"
    r"(?:here(?:'s| is| are)\b[^:]{0,60}:|(?:answer|output|reply|text|message|rewritten|revised"
    r"|paraphrased?|rephrased|completed?)(?: (?:text|version|message|sentence))?:)\s*",
    re.IGNORECASE,
)
_MARK = re.compile(r"^(?:[-*•>]+|\(?\d{1,2}[.)])\s+")
_QUOTES = (
    ('"', '"'),
    ("'", "'"),
    ("\u201c", "\u201d"),
    ("\u2018", "\u2019"),
    ("`", "`"),
    ("*", "*"),
)
_NEVER_CLOSED = {'"': '"', "\u201c": "\u201d"}  # where a reply was cut
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|language model|assistant)\b"
    r"|\b(?:language|ai) model\b|\bdesigned to (?:assist|help)\b"
    r"|\bi(?:'m| am) (?:an ai\b|(?:sorry|unable)\b[^.?!]{0,40}\b(?:assist|provide|help)\b)"
    r"|\bi (?:can't|cannot|can not) (?:assist|help|provide|fulfil|create|generate)\b"
    r"|\bi apologi[sz]e\b",
    re.IGNORECASE,
)
_INSTRUCTION = re.compile(
    r"\bwrite one (?:of|that|like)\b|(?:^|\bof )\d+ words?\b|<\||\|>|" + re.escape(BLANK),
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Brief:
    """What texts should be, in public words.

    Attributes:
      about: What they are, in the plural, such as "short messages in a technical chat room".
      examples: Public texts of the kind; six or more make a small model useful.
      topics: What they may be about.
      tones: Moods that they may be in; empty: a list of common ones.
      max_words: Of the longest.
    """

    about: str
    examples: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    tones: tuple[str, ...] = ()
    max_words: int = 40

    def __post_init__(self) -> None:
        """Refuse a brief that nobody could write by."""
        if not self.about.strip() or not 1 <= self.max_words <= 1000:
            raise ConfigError(
                "a brief needs what the texts are about, and max_words of 1 to 1,000, not"
                f" {self.about!r} and {self.max_words!r}"
            )


@dataclass(frozen=True)
class Counts:
    """What became of the replies, and of the texts that were wanted.

    Attributes:
      replies: That were asked for.
      usable: That became a text.
      unanswered: For which the model had no words: refused by a filter, empty, or too long a
        prompt.
      refused: That say that they will not.
      empty: Of which nothing was left, or one word where more were wanted.
      echoes: That repeat the prompt or a public example.
      copies: That are their source.
      duplicates: That are another text of the same batch.
      long: That go on far beyond the length asked for, without a mark to cut them at.
      garbled: That go in circles, or hold what is no word.
      unprintable: That hold control characters or what is no UTF-8.
      strayed: That do not begin as they were told to.
      kept: Texts for which all replies failed: the source stands in, or for a random text a
        public example or another text of the batch.
    """

    replies: int = 0
    usable: int = 0
    unanswered: int = 0
    refused: int = 0
    empty: int = 0
    echoes: int = 0
    copies: int = 0
    duplicates: int = 0
    long: int = 0
    garbled: int = 0
    unprintable: int = 0
    strayed: int = 0
    kept: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Both together."""
        return Counts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)}
        )


@dataclass(frozen=True, eq=False)
class Written:
    """Texts that were written.

    Attributes:
      texts: Each on one line.
      parents: Position of the text that each varies; -1 for a random one. `(num_texts,)`.
      counts: What was filtered on the way.
    """

    texts: list[str]
    parents: NDArray[np.int64]
    counts: Counts


@dataclass(frozen=True)
class Writer:
    """Asks a language model.

    A variation is a paraphrase or a fill-in, by a coin. A paraphrase is one more text like the
    source, in a random tone, that begins with up to half of its words: fewer, the higher the
    degree. A fill-in keeps words of the source and has the model write the others: the share that
    is written anew is the degree. By default the blanks are at the end, which a small model fills
    well; a large one can be given blanks anywhere.

    Lengths of variations are spread about the source's, those of random texts about the public
    examples'. Small models do not heed the length that they are asked for; so the reply is stopped
    soon after, and cut where a sentence ends.

    Attributes:
      model: Who is asked.
      replies: Where replies are kept.
      brief: What texts should be.
      fill_in_share: Of variations that are fill-ins.
      blanks: Where they are.
      temperature: Of sampling.
      top_p: Of sampling.
    """

    model: LanguageModel
    replies: Replies
    brief: Brief
    fill_in_share: float = 0.5
    blanks: Literal["end", "anywhere"] = "end"
    temperature: float = 0.9
    top_p: float = 0.9

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0 <= self.fill_in_share <= 1:
            raise ConfigError(f"fill_in_share must be from 0 to 1, not {self.fill_in_share!r}")

    def random_texts(self, num: int, rng: np.random.Generator) -> Written:
        """So many new texts, each on a random topic and in a random tone.

        Args:
          num: How many.
          rng: Public randomness. What is drawn from it hangs on `num` alone.

        Raises:
          ConfigError: The model's settings cannot work.
          FedsynthError: The model failed, or gave nothing that could be used.
        """
        seeds, patches = rng.integers(MAX_SEED, size=(_ATTEMPTS_RANDOM, num)), rng.permutation(num)
        manners = self._manners(rng, num, _ATTEMPTS_RANDOM)
        texts, counts = self._written(
            [
                [self._new(int(seed), manner) for seed, manner in zip(row, row_of, strict=True)]
                for row, row_of in zip(seeds, manners, strict=True)
            ]
        )
        whole = self._patched(texts, patches, counts)
        return Written(whole, np.full(num, -1, dtype=np.int64), counts)

    def vary(
        self,
        texts: Sequence[str],
        degree: float,
        rng: np.random.Generator,
        *,
        num_each: int = 1,
    ) -> Written:
        """Variations of each text, those of the first text first.

        Where all replies fail it is the text itself; an empty text becomes a random one.

        Args:
          texts: Public or released.
          degree: How far, from 0 (a few words) to 1 (little but the kind stays).
          rng: Public randomness. What is drawn from it hangs on the texts and `num_each` alone.
          num_each: How many of each.

        Raises:
          ConfigError: The model's settings cannot work, or the degree is none.
          FedsynthError: The model failed.
        """
        if not 0 <= degree <= 1:
            raise ConfigError(f"the degree of a variation is from 0 to 1, not {degree!r}")
        sources = [" ".join(text.split()) for text in texts for _ in range(num_each)]
        seeds = rng.integers(MAX_SEED, size=(_ATTEMPTS_VARY, len(sources)))
        manners = self._manners(rng, len(sources), _ATTEMPTS_VARY)
        found, counts = self._written(
            [
                [
                    self._changed(source, degree, int(seed), manner)
                    for source, seed, manner in zip(sources, row, row_of, strict=True)
                ]
                for row, row_of in zip(seeds, manners, strict=True)
            ]
        )
        whole = [
            source if text is None else text for source, text in zip(sources, found, strict=True)
        ]
        parents = np.repeat(np.arange(len(texts), dtype=np.int64), num_each)
        return Written(whole, parents, counts)

    def expand(
        self, examples: Sequence[str], shown: NDArray[np.int64], rng: np.random.Generator
    ) -> Written:
        """New texts, each after examples of its own that stand where the brief's would.

        Of neighbors that are shown the same, all requests begin with the same turns, which a local
        model reads once. Lengths are spread about those of the examples; topics and tones are
        theirs alone. Where all replies fail it is the first example.

        Args:
          examples: Public or released.
          shown: Which of them each text is written after, `(num_texts, num_shown)`.
          rng: Public randomness. What is drawn from it hangs on `shown` alone.

        Raises:
          ConfigError: The model's settings cannot work.
          FedsynthError: The model failed.
        """
        plain = [" ".join(example.split()) for example in examples]
        seeds = rng.integers(MAX_SEED, size=(_ATTEMPTS_VARY, len(shown)))
        found, counts = self._written(
            [
                [
                    self._like([plain[i] for i in dict.fromkeys(index)], int(seed), attempt)
                    for index, seed in zip(shown.tolist(), row, strict=True)
                ]
                for attempt, row in enumerate(seeds)
            ],
            known=plain,
        )
        whole = [plain[i] if t is None else t for i, t in zip(shown[:, 0], found, strict=True)]
        return Written(whole, shown[:, 0], counts)

    def fingerprint(self) -> str:
        """SHA-256 of the model, the brief, the settings and the version of the prompts."""
        return digest_of(
            {
                "model": self.model.fingerprint(),
                "brief": asdict(self.brief),
                "settings": [self.fill_in_share, self.blanks, self.temperature, self.top_p],
                "version": _VERSION,
            }
        )

    def estimate(self, num: int) -> Estimate:
        """About what so many texts cost, if none is asked for twice."""
        rng = np.random.default_rng(0)
        (manners,) = self._manners(rng, min(num, _BLOCK), 1)
        guess = self.model.estimate([self._new(i, one).prompt for i, one in enumerate(manners)])
        times = num / max(1, len(manners))
        return Estimate(
            math.ceil(guess.tokens_in * times),
            math.ceil(guess.tokens_out * times),
            guess.cpu_s * times,
            guess.cost * times,
        )

    def _manners(self, rng: np.random.Generator, num: int, attempts: int) -> "list[list[_Manner]]":
        """How each text is asked for, in each attempt."""
        shown = [" ".join(example.split()) for example in self.brief.examples]
        picks = [rng.permutation(len(shown))[:_SHOWN] for _ in range(-(-num // _BLOCK))]
        turns = [_turns([shown[i] for i in pick]) for pick in picks]
        first = [self._manner(turns[i // _BLOCK], 0) for i in range(num)]
        later = [  # few are left: it does not pay to read other turns
            [self._manner(first[0].turns, attempt)] * num
            for attempt in range(1, attempts if num else 1)
        ]
        return [first, *later] if num else [[] for _ in range(attempts)]

    def _manner(self, turns: tuple[tuple[str, str], ...], attempt: int) -> "_Manner":
        """How a text is asked for in an attempt, counted from 0."""
        if not attempt:
            return _Manner(turns, self.temperature, self.top_p)
        hotter = min(2.0, self.temperature + _HOTTER * attempt)
        return _Manner(turns, hotter, max(self.top_p, _WIDER))

    def _new(self, seed: int, manner: "_Manner") -> "_Try":
        """The request for one new text."""
        rng = np.random.default_rng(seed)
        lengths = [len(text.split()) for text in self.brief.examples] or [self.brief.max_words // 2]
        num_words = self._length(lengths[int(rng.integers(len(lengths)))], 1.0, rng)
        asked = f"Write one of {_words(num_words)}, {self._tone(rng)}"
        if self.brief.topics:
            asked += f", about {self.brief.topics[int(rng.integers(len(self.brief.topics)))]}"
        return self._try(f"{asked}.", num_words, seed, manner)

    def _like(self, examples: Sequence[str], seed: int, attempt: int) -> "_Try":
        """The request for one new text after examples."""
        rng = np.random.default_rng(seed)
        about = examples[int(rng.integers(len(examples)))]
        num_words = self._length(len(about.split()), 1.0, rng)
        manner = self._manner(_turns(examples), attempt)
        return self._try(f"Write one of {_words(num_words)}.", num_words, seed, manner)

    def _changed(self, source: str, degree: float, seed: int, manner: "_Manner") -> "_Try":
        """The request for one variation of a text."""
        rng, words = np.random.default_rng(seed), source.split()
        if not words:
            return self._new(seed, manner)
        num_words = self._length(len(words), degree, rng)
        asked = f"Write one of {_words(num_words)}"
        if rng.random() >= self.fill_in_share:
            kept = words[: int(len(words) * (1 - degree) / 2)]
            asked += f" like this, but {self._tone(rng)}: {source}"
        elif self.blanks == "end":
            kept = words[: min(len(words) - 1, round(len(words) * (1 - degree)))]
            # a small model takes what it has just read for the whole text, and ends there
            is_told = kept and not self.model.forces_openings
            asked += f" that begins with: {' '.join(kept)}" if is_told else "."
        else:
            gapped = _gapped(words, degree, rng)
            kept = gapped[: gapped.index(BLANK)]
            asked += f" with the blanks filled: {' '.join(gapped)}"
        return self._try(asked, num_words, seed, manner, opening=" ".join(kept), source=source)

    def _try(
        self,
        asked: str,
        num_words: int,
        seed: int,
        manner: "_Manner",
        *,
        opening: str = "",
        source: str = "",
    ) -> "_Try":
        """A request, and what its reply will be judged by."""
        num_kept = len(opening.split())
        most = min(self.brief.max_words, math.ceil(_SLACK * num_words) + _SLACK_WORDS)
        most = max(most, num_kept + 1)
        prompt = Prompt(
            asked,
            system=f"You write {self.brief.about}. You answer with one such text and nothing else.",
            max_tokens=math.ceil(_TOKENS_A_WORD * (most - num_kept)) + 8,
            temperature=manner.temperature,
            top_p=manner.top_p,
            seed=seed,
            turns=manner.turns,
            opening=opening,
            stop=("\n",),
        )
        return _Try(prompt, source, num_words, most)

    def _length(self, num_words: float, degree: float, rng: np.random.Generator) -> int:
        """A length about another one, more widely so the higher the degree."""
        spread = math.exp(rng.normal(0.0, _LENGTH_SPREAD * degree))
        return max(1, min(self.brief.max_words, round(num_words * spread)))

    def _tone(self, rng: np.random.Generator) -> str:
        """A random tone."""
        tones = self.brief.tones or TONES
        return tones[int(rng.integers(len(tones)))]

    def _written(
        self, tries: "Sequence[Sequence[_Try]]", known: Sequence[str] = ()
    ) -> tuple[list[str | None], Counts]:
        """For each place the first usable text of its tries; all places are tried at once.

        A text that is `known`, or one of the brief's examples, is not usable.
        """
        texts: list[str | None] = [None] * len(tries[0])
        seen: set[str] = set()
        shown = {_plain(example) for example in (*self.brief.examples, *known)}
        tally: Counter[str] = Counter()
        for row in tries:
            left = [i for i, text in enumerate(texts) if text is None]
            found = self.replies.completed(self.model, [row[i].prompt for i in left])
            tally["replies"] += len(left)
            for i, reply in zip(left, found, strict=True):
                text, fault = _judged(reply, row[i], shown)
                if not fault and _plain(text) in seen:
                    fault = "duplicates"
                tally[fault or "usable"] += 1
                if not fault:
                    texts[i] = text
                    seen.add(_plain(text))
        return texts, Counts(**tally, kept=sum(text is None for text in texts))

    def _patched(
        self, texts: "Sequence[str | None]", patches: NDArray[np.int64], counts: Counts
    ) -> list[str]:
        """Random texts, with public examples or others of them where none could be had.

        Raises:
          FedsynthError: Nothing that the model says can be used.
        """
        usable = [text for text in texts if text is not None]
        spare = [*self.brief.examples] or usable
        if texts and (not spare or (not usable and counts.replies >= _EMPTY_HANDED)):
            raise FedsynthError(
                f"model {self.model.name!r} gave no usable text in {counts.replies} replies"
                f" ({_faults(counts)}). Give the brief public examples, or take a larger model"
            )
        return [
            spare[int(patch) % len(spare)] if text is None else text
            for text, patch in zip(texts, patches, strict=True)
        ]


@dataclass(frozen=True)
class _Manner:
    """How a text is asked for, whatever is asked.

    Attributes:
      turns: Earlier ones, in which public examples are the answers.
      temperature: Of sampling.
      top_p: Of sampling.
    """

    turns: tuple[tuple[str, str], ...]
    temperature: float
    top_p: float


@dataclass(frozen=True)
class _Try:
    """A request, and what its reply is judged by.

    Attributes:
      prompt: What is asked.
      source: The text that is varied; empty for a random one.
      num_words: Length asked for.
      most_words: Length that is let pass.
    """

    prompt: Prompt
    source: str
    num_words: int
    most_words: int


def _judged(reply: str | None, tried: _Try, shown: set[str]) -> tuple[str, str]:
    """The text in a reply, and the count of `Counts` that it falls under if it is not usable."""
    if reply is None:
        return "", "unanswered"
    opening = tried.prompt.opening
    is_as_told = bool(opening) and reply.startswith(opening)
    text = (" ".join(reply.split()) if is_as_told else _stripped(reply)).removesuffix("```").strip()
    if not _plain(text).startswith(_plain(opening)):
        return "", "strayed"
    if any(not c.isprintable() or c == "\ufffd" for c in text):
        return "", "unprintable"
    if _REFUSAL.search(text):
        return "", "refused"
    is_tiny = len(text.split()) == 1 and tried.num_words >= _MORE_THAN_ONE
    if not _plain(text) or is_tiny or _plain(text) == _plain(opening):
        return "", "empty"
    text = _cut(text, tried).rstrip(",; ")
    if not text:
        return "", "long"
    if _INSTRUCTION.search(text) or _plain(text) in shown:
        return "", "echoes"
    if _plain(text) == _plain(tried.source):
        return "", "copies"
    return ("", "garbled") if _is_garbled(text) else (text, "")


def _stripped(reply: str) -> str:
    """A reply on one line, without what models put around a text."""
    text = " ".join(reply.split())
    for pattern in (_LABEL, _MARK):
        text = pattern.sub("", text)
    for first, last in _QUOTES:
        if len(text) > 1 and text[0] == first and text[-1] == last and first not in text[1:-1]:
            text = text[1:-1].strip()
    if text[:1] in _NEVER_CLOSED and _NEVER_CLOSED[text[0]] not in text[1:]:
        text = text[1:]
    return text


def _cut(text: str, tried: _Try) -> str:
    """A text of no more words than may be, ending where a sentence or a clause does.

    Empty, if none ends between half of the length asked for and the length that is let pass.
    """
    words = text.split()
    if len(words) <= tried.most_words:
        return text
    fewest = max(len(tried.prompt.opening.split()) + 1, tried.num_words // 2)
    for marks in (".!?\u2026", ",;:"):
        for end in range(tried.most_words, fewest - 1, -1):
            if words[end - 1][-1] in marks:
                return " ".join(words[:end]).rstrip(":")
    return ""


def _is_garbled(text: str) -> bool:
    """Whether a text goes in circles, or holds what is no word."""
    words = text.casefold().split()
    if max(map(len, words)) > _LONGEST_WORD:
        return True
    pairs = list(pairwise(words))
    if len(pairs) >= 4 and len(set(pairs)) < _MOST_REPEATED * len(pairs):
        return True
    most = Counter(word.strip(".,;:!?") for word in words).most_common(1)[0][1]
    return len(words) >= 6 and most > len(words) / 2


def _gapped(words: Sequence[str], degree: float, rng: np.random.Generator) -> list[str]:
    """Words of which a share is left blank, in one run or two."""
    num_blank = max(1, round(degree * len(words)))
    num_runs = min(num_blank, int(rng.integers(1, 3)))
    sizes = [num_blank - num_blank // 2, num_blank // 2] if num_runs == 2 else [num_blank]
    before = np.sort(rng.integers(0, len(words) - num_blank + 1, size=num_runs))
    gapped: list[str] = []
    place = 0
    for num_kept, size in zip(np.diff(before, prepend=0), sizes, strict=True):
        gapped += [*words[place : place + num_kept], BLANK]
        place += int(num_kept) + size
    return gapped + list(words[place:])


def _turns(examples: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Earlier turns in which examples are the answers."""
    return tuple((f"Write one of {_words(len(text.split()))}.", text) for text in examples)


def _words(num: int) -> str:
    """A number of words, in words."""
    return f"{num} word{'s' if num > 1 else ''}"


def _plain(text: str) -> str:
    """Letters and digits alone, by which two texts are alike."""
    return "".join(c for c in text.casefold() if c.isalnum())


def _faults(counts: Counts) -> str:
    """What was wrong, most frequent first."""
    found = {f.name: getattr(counts, f.name) for f in fields(Counts)}
    for name in ("replies", "usable", "kept"):
        del found[name]
    named = sorted(((num, name) for name, num in found.items() if num), reverse=True)
    return ", ".join(f"{num} {name}" for num, name in named)
