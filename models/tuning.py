# SPDX-License-Identifier: Apache-2.0
"""Teach a language model which of two replies is preferred: DPO on adapters of low rank.

The model's own weights stay as they are, which is checked after each round of lessons; what is
learned is a few hundred thousand numbers beside them. All on one core and in a fixed order, so on
one machine the same lessons give the same adapter.

Reference:
  Rafailov et al. (2023), "Direct Preference Optimization", equation 7, arXiv 2305.18290.
  Hu et al. (2022), "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError, FedsynthError
from .one_core import one_core
from .transformer import ends_of, loaded

Adapter = Mapping[str, NDArray[np.float32]]
"""Weights that were learned, by name."""

_NEEDED_BY = "model 'policy'"
_PARTS = ["q_proj", "v_proj"]  # of each attention layer, what gets an adapter
_MOST_GRADIENT = 1.0  # longest gradient of a step


@dataclass(frozen=True)
class Pair:
    """One lesson in tokens.

    Attributes:
      prompt: The conversation up to where the model speaks.
      chosen: The reply that is preferred, to its end.
      rejected: The other one.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class Tuning:
    """How lessons are taught.

    Attributes:
      rank: Of the adapters.
      alpha: What an adapter adds is multiplied by `alpha / rank`.
      beta: How dearly the model pays for leaving what it said before; > 0.
      learning_rate: Of Adam; > 0.
      passes: How often a round's lessons are gone through.
      batch: Lessons a step.
    """

    rank: int = 8
    alpha: int = 16
    beta: float = 0.1
    learning_rate: float = 1.5e-3
    passes: int = 3
    batch: int = 4

    def __post_init__(self) -> None:
        """Refuse what nothing could be learned by."""
        whole = (self.rank, self.alpha, self.passes, self.batch)
        if not (min(whole) >= 1 and self.beta > 0 and 0 < self.learning_rate < 1):
            raise ConfigError(
                "learning needs rank, alpha, passes and batch of 1 or more, beta above 0 and a"
                f" learning_rate in (0, 1), not {self}"
            )


class Pupil:
    """A causal model that learns beside its weights, and writes.

    Args:
      where: Folder or GGUF file of the model; its weights are shared with who else runs it.
      tuning: How it is taught.

    Raises:
      ConfigError: A package or the model is missing, or the model has no such attention layers.
    """

    def __init__(self, where: Path, tuning: Tuning) -> None:
        try:
            import peft
        except ImportError as error:
            raise ConfigError(
                f"{_NEEDED_BY} needs peft: pip install 'fedsynth[preferences]'"
            ) from error
        self.tokenizer, base = loaded(where)
        self.tuning = tuning
        with one_core(_NEEDED_BY, learns=True) as torch, torch.random.fork_rng(devices=[]):
            shared = {id(weight): weight for weight in base.parameters()}
            network = copy.deepcopy(base, shared)
            settings = peft.LoraConfig(
                r=tuning.rank,
                lora_alpha=tuning.alpha,
                target_modules=_PARTS,
                task_type="CAUSAL_LM",
            )
            try:
                with warnings.catch_warnings():  # peft asks transformers by a name of old
                    warnings.simplefilter("ignore", FutureWarning)
                    self._network: Any = peft.get_peft_model(network, settings).eval()
            except ValueError as error:
                raise ConfigError(
                    f"{_NEEDED_BY} cannot teach the model in {where}: {error}"
                ) from None
            # one network of two may run without an adapter; both read the same weights
            for weight in base.parameters():
                weight.requires_grad_(False)
            self._learned = {n: w for n, w in self._network.named_parameters() if w.requires_grad}
            self._fresh = _fresh(self.adapter())
            self.take(None)
        self._ends = ends_of(self.tokenizer, base)
        self.context = int(base.config.max_position_embeddings)

    def adapter(self) -> Adapter:
        """What it has learned so far."""
        return {name: w.detach().numpy().copy() for name, w in self._learned.items()}

    def take(self, adapter: Adapter | None) -> None:
        """Know what an adapter holds, and nothing else; `None`: nothing.

        Raises:
          ConfigError: It is no adapter of this model.
        """
        given = self._fresh if adapter is None else adapter
        shapes = {name: tuple(w.shape) for name, w in self._learned.items()}
        if {name: w.shape for name, w in given.items()} != shapes:
            raise ConfigError("an adapter of another model, or of another rank")
        with one_core(_NEEDED_BY, learns=True) as torch, torch.no_grad():
            for name, weight in self._learned.items():
                weight.copy_(torch.from_numpy(np.array(given[name], dtype=np.float32)))

    def learn(self, pairs: Sequence[Pair]) -> list[float]:
        """Go through a round's lessons; the loss of each step.

        The model is held to what it said when the round began.

        Raises:
          FedsynthError: The adapter did not move, moved to where no number is, or the model's own
            weights moved, as happens when an adapter is not wired to what is trained.
        """
        if not pairs:
            return []
        losses: list[float] = []
        with one_core(_NEEDED_BY, learns=True) as torch:
            before, base = self.adapter(), self._base_sums()
            with torch.no_grad():
                held = [self._margin(torch, pair) for pair in pairs]
            weights = list(self._learned.values())
            steps = torch.optim.Adam(weights, lr=self.tuning.learning_rate)
            order = [i for _ in range(self.tuning.passes) for i in range(len(pairs))]
            for start in range(0, len(order), self.tuning.batch):
                part = order[start : start + self.tuning.batch]
                steps.zero_grad()
                total = 0.0
                for i in part:
                    gain = self.tuning.beta * (self._margin(torch, pairs[i]) - held[i])
                    loss = -torch.nn.functional.logsigmoid(gain) / len(part)
                    loss.backward()
                    total += float(loss.detach())
                torch.nn.utils.clip_grad_norm_(weights, _MOST_GRADIENT)
                steps.step()
                losses.append(total)
            after = self.adapter()
            is_finite = all(np.isfinite(w).all() for w in after.values())
            has_moved = any((after[name] != before[name]).any() for name in after)
            if not (is_finite and has_moved and self._base_sums() == base):
                raise FedsynthError(
                    "a language model did not learn: its adapter stayed as it was or is no number"
                    " any more, or its own weights moved. Lower learning_rate, or take the tested"
                    " versions of torch, transformers and peft"
                )
        return losses

    def margin(self, pair: Pair) -> float:
        """By how much the chosen reply is likelier than the rejected one, as a logarithm."""
        with one_core(_NEEDED_BY) as torch:
            return float(self._margin(torch, pair))

    def written(
        self,
        prompt: Sequence[int],
        num: int,
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[str]:
        """So many replies to a prompt, each to the end of its first line.

        Args:
          prompt: Tokens of the conversation up to where the model speaks.
          num: How many; they are written side by side.
          max_tokens: Of each, at most.
          temperature: Of sampling; > 0.
          top_p: Tokens are drawn from the likeliest that hold this probability.
          seed: Of these replies.
        """
        texts, open_ = [""] * num, [True] * num
        tokens: list[list[int]] = [[] for _ in range(num)]
        with one_core(_NEEDED_BY) as torch:
            generator = torch.Generator()
            generator.manual_seed(seed)
            step = self._network(input_ids=torch.tensor([list(prompt)]), use_cache=True)
            past = step.past_key_values
            past.batch_repeat_interleave(num)
            logits = step.logits[:, -1].expand(num, -1)
            for _ in range(max_tokens):
                drawn = _drawn(torch, logits, temperature, top_p, generator)
                for row, token in enumerate(drawn.tolist()):
                    if not open_[row] or token in self._ends:
                        open_[row] = False
                        continue
                    tokens[row].append(token)
                    texts[row] = self.tokenizer.decode(tokens[row], skip_special_tokens=True)
                    open_[row] = "\n" not in texts[row].lstrip()
                if not any(open_):
                    break
                step = self._network(input_ids=drawn[:, None], past_key_values=past, use_cache=True)
                past, logits = step.past_key_values, step.logits[:, -1]
        return [text.strip().partition("\n")[0].strip() for text in texts]

    def reply_tokens(self, text: str) -> tuple[int, ...]:
        """Tokens of a reply, with the one that ends it."""
        read = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*read, int(self.tokenizer.eos_token_id))

    def _margin(self, torch: Any, pair: Pair) -> Any:
        """Log-likelihood of the chosen reply less the rejected one's; the prompt is read once."""
        longest = max(len(pair.chosen), len(pair.rejected))
        replies = torch.zeros((2, longest), dtype=torch.long)
        counts = torch.zeros((2, longest))
        for row, reply in enumerate((pair.chosen, pair.rejected)):
            replies[row, : len(reply)] = torch.tensor(reply)
            counts[row, : len(reply)] = 1.0
        read = self._network(input_ids=torch.tensor([pair.prompt]), use_cache=True)
        past = read.past_key_values
        past.batch_repeat_interleave(2)
        logits = read.logits[:, -1:].expand(2, -1, -1)
        if longest > 1:
            told = self._network(input_ids=replies[:, :-1], past_key_values=past, use_cache=True)
            logits = torch.cat([logits, told.logits], dim=1)
        likelihoods = logits.log_softmax(-1).gather(2, replies[:, :, None])[:, :, 0]
        both = (likelihoods * counts).sum(1)
        return both[0] - both[1]

    def _base_sums(self) -> list[float]:
        """A sum of each of the model's own weights, which no lesson may change."""
        own = (w for name, w in self._network.named_parameters() if name not in self._learned)
        return [float(weight.detach().double().sum()) for weight in own]


@lru_cache(maxsize=1)
def pupil_of(where: Path, tuning: Tuning) -> Pupil:
    """A pupil, the last one kept between requests."""
    return Pupil(where, tuning)


def _fresh(adapter: Adapter) -> Adapter:
    """An adapter that has learned nothing: one factor is random, the other zeros."""
    rng = np.random.default_rng(0)
    fresh = {}
    for name, weight in sorted(adapter.items()):
        bound = 0.0 if "lora_B" in name else weight.shape[1] ** -0.5
        fresh[name] = rng.uniform(-bound, bound, weight.shape).astype(np.float32)
    return fresh


def _drawn(torch: Any, logits: Any, temperature: float, top_p: float, generator: Any) -> Any:
    """The next token of each row, `(num_rows,)`."""
    probs, order = torch.softmax(logits / temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    probs[probs.cumsum(-1) - probs >= top_p] = 0.0
    place = torch.multinomial(probs, 1, generator=generator)
    return order.gather(1, place)[:, 0]
