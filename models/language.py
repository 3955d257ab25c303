# SPDX-License-Identifier: Apache-2.0
"""What a language model is asked, and what one is to the rest of the house."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, TypeVar

from ..core.errors import ConfigError
from .variation import Capabilities, Estimate

T = TypeVar("T")

MAX_SEED = (1 << 31) - 1
"""Largest seed of a reply: every known endpoint takes it, and none of them takes it for "any"."""

_BYTES_A_TOKEN = 4  # of English text, as a rule of thumb
_TURN_TOKENS = 8  # that a chat template puts around one turn


@dataclass(frozen=True)
class Prompt:
    """One request to a language model; its digest names it for ever.

    Attributes:
      text: The user's turn.
      system: The system's turn before everything; empty: none, or the model's own.
      max_tokens: Most tokens of the reply; >= 1.
      temperature: Of sampling; 0 takes the likeliest token each time.
      top_p: Tokens are drawn from the likeliest that hold this probability; in (0, 1].
      seed: Of this reply alone, at most `MAX_SEED`.
      turns: Earlier turns (user's, model's) that show how it is done.
      opening: With which the reply begins, from a model that can be made to; others do not see it.
      stop: The reply ends before the first of these.

    Raises:
      ConfigError: A number is out of its range.
    """

    text: str
    system: str = ""
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    turns: tuple[tuple[str, str], ...] = ()
    opening: str = ""
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (
            self.max_tokens >= 1
            and 0 <= self.temperature <= 2
            and 0 < self.top_p <= 1
            and 0 <= self.seed <= MAX_SEED
        ):
            raise ConfigError(
                "a prompt needs max_tokens of 1 or more, temperature in [0, 2], top_p in (0, 1] and"
                f" a seed in [0, {MAX_SEED}], but came with {self.max_tokens}, {self.temperature},"
                f" {self.top_p} and {self.seed}"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says, in hexadecimal digits."""
        return digest_of(asdict(self))

    def messages(self, *, is_opened: bool) -> list[dict[str, str]]:
        """The conversation, as chat templates and endpoints take it.

        Args:
          is_opened: The opening stands last, as a turn of the model that is not yet over.
        """
        said = [("system", self.system)] if self.system else []
        for user, model in self.turns:
            said += [("user", user), ("assistant", model)]
        said.append(("user", self.text))
        if is_opened and self.opening:
            said.append(("assistant", self.opening))
        return [{"role": role, "content": clean(text)} for role, text in said]


class LanguageModel(ABC):
    """A public model that replies to prompts.

    A frozen dataclass whose fields are its settings, of TOML's types.

    Attributes:
      name: Under which it is found.

    Privacy:
      A prompt may go to another machine, so what stands in it is given away. Prompts are written
      from public words and from candidates that noisy votes released, never from a shard.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def forces_openings(self) -> bool:
        """Whether every reply begins with its prompt's opening; else none sees it."""

    @abstractmethod
    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        """Each prompt's position and reply, as they are done, in any order.

        `None` is final: refused, empty, or failed in a way that another try would not mend. What
        another try may mend is an error, after everything that did come has been handed over:
        it must not change what a run goes on with.

        Raises:
          ConfigError: The settings, or what they name, cannot work.
          FedsynthError: The model failed; what it owes can be asked of it again.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of weights, template and sampler."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it works on, and where it takes what it is shown."""

    @abstractmethod
    def estimate(self, prompts: Sequence[Prompt]) -> Estimate:
        """What the prompts would cost; nothing is asked."""


def digest_of(said: Any) -> str:
    """SHA-256 of what JSON can say, in hexadecimal digits; floats by their shortest decimals."""
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def clean(text: str) -> str:
    """The text with what no UTF-8 can hold (half a pair of surrogates) replaced by `?`."""
    return text.encode("utf-8", errors="replace").decode()


def tokens_likely(prompts: Sequence[Prompt]) -> tuple[int, int]:
    """About how many tokens prompts have, and at most how many their replies."""
    total = 0
    for prompt in prompts:
        turns = prompt.messages(is_opened=True)
        num_bytes = sum(len(turn["content"].encode()) for turn in turns)
        total += num_bytes // _BYTES_A_TOKEN + _TURN_TOKENS * len(turns)
    return total, sum(prompt.max_tokens for prompt in prompts)


def side_by_side(ask: Callable[[int], T], num: int, at_once: int) -> Iterator[tuple[int, T]]:
    """What `ask` returns for each position below `num`, as it is done, from threads.

    No more are begun than `at_once` beyond what the caller has taken, so that no more than those
    can be lost with the process. Once one fails, no other is begun; what the running ones still
    bring is handed over, and then the failure is raised.

    Args:
      ask: Called with a position, in a thread.
      num: How many positions.
      at_once: How many calls run side by side; >= 1.
    """
    failed: BaseException | None = None
    with ThreadPoolExecutor(at_once, thread_name_prefix="replies") as pool:
        left = iter(range(num))
        running = {pool.submit(ask, position): position for position in islice(left, at_once)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                position, error = running.pop(future), future.exception()
                if error is None:
                    yield position, future.result()
                failed = failed or error
                if failed is None:
                    running |= {pool.submit(ask, after): after for after in islice(left, 1)}
    if failed is not None:
        raise failed
