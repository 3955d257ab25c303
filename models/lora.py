# SPDX-License-Identifier: Apache-2.0
"""A frozen Llama in bfloat16 with adapters of low rank in a few layers: losses, and new texts.

A text follows a public prompt, which adapters leave as it is: the prompt's keys and values are made
once. What lies beneath the first adapted layer is the same in every round, so a record's states
there are kept in memory, and a round costs the layers above and the output alone.

Of an adapter `C B A` beside a weight, A and C are public and never trained (`factors`): half the
numbers to put noise on, and a step in B is a step in the product.

Reference:
  Hu et al. (2022), "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; Sun et
  al. (2024), "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from .llama import sha256_of
from .one_core import dense, one_core, torch_for
from .transformer import ends_of, loaded

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Weights of a layer that an adapter may stand beside."""

_NEEDED_BY = "a language model that users tune"
_WANTED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_READ = (".safetensors", ".gguf", "config.json", "tokenizer.json")
_KEPT_BYTES = 1 << 30  # of records' states

Adapters = Mapping[str, tuple[Any, Any, Any]]
"""By `layer.part`: A, `(rank, inputs)`; B, which is trained; and C, `(outputs, outputs)` or `None`.

B is `(outputs, rank)`, or `(rows, outputs, rank)` where each row has its own.
"""


@dataclass(frozen=True)
class Place:
    """Where adapters stand.

    Attributes:
      first_layer: The first adapted layer, from 0.
      num_layers: How many from there on.
      parts: Of `PARTS`, what is adapted in each.
      rank: Of every adapter.
    """

    first_layer: int
    num_layers: int
    parts: tuple[str, ...]
    rank: int

    def __post_init__(self) -> None:
        """Refuse a place that is none."""
        if not (
            self.first_layer >= 0
            and self.num_layers >= 1
            and 1 <= self.rank <= 256
            and self.parts
            and set(self.parts) <= set(PARTS)
            and len({*self.parts}) == len(self.parts)
        ):
            raise ConfigError(
                "adapters need first_layer of 0 or more, num_layers of 1 or more, rank of 1 to 256"
                f" and parts that are different ones of {', '.join(PARTS)}, not {self}"
            )


class Frozen:
    """A causal model whose weights stay, after a public prompt.

    Args:
      where: Folder or GGUF file.

    Raises:
      ConfigError: A package is missing, or this is no such model.
    """

    def __init__(self, where: Path) -> None:
        self.tokenizer, network = loaded(where)
        config = network.config
        came = {key: getattr(config, key, None) for key in _WANTED}
        rope = getattr(config, "rope_parameters", None) or {}
        if came != _WANTED or rope.get("rope_type", "default") != "default":
            raise ConfigError(f"adapters are for a model with {_WANTED}, and {where} has {came}")
        torch = torch_for(_NEEDED_BY)
        self.num_layers = int(config.num_hidden_layers)
        self.context = int(config.max_position_embeddings)
        self.ends = ends_of(self.tokenizer, network)
        self.end = int(self.tokenizer.eos_token_id)
        self._heads = (int(config.num_attention_heads), int(config.num_key_value_heads))
        self._head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self._eps = float(config.rms_norm_eps)
        self._turns = network.model.rotary_emb.inv_freq.float().clone()
        with one_core(_NEEDED_BY, learns=True), torch.no_grad():
            state = {n: w.detach().bfloat16() for n, w in network.state_dict().items()}
            self._words = state["model.embed_tokens.weight"]
            self._last = state["model.norm.weight"]
            self._output = _Linear(torch, state.get("lm_head.weight", self._words))
            self._layers = [
                {
                    name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): (
                        _Linear(torch, weight) if weight.ndim == 2 else weight
                    )
                    for name, weight in state.items()
                    if name.startswith(f"model.layers.{i}.")
                }
                for i in range(self.num_layers)
            ]
        self._kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._kept_bytes = 0
        self.tried: dict[tuple[Any, ...], tuple[int, ...]] = {}  # by `slopes`: chunks that may be

    def sizes(self, part: str) -> tuple[int, int]:
        """Inputs and outputs of a part of any layer."""
        outputs, inputs = self._layers[0][_full(part)].shape
        return inputs, outputs

    @property
    def num_words(self) -> int:
        """Tokens that there are."""
        return len(self._words)

    def told(self, prompt: str) -> tuple[int, list[tuple[Any, Any]]]:
        """A prompt's last token, and keys and values of those before it, a pair a layer."""
        return _told(self, prompt)

    def heard(self, prompt: str, name: str) -> tuple[Any, Any]:
        """What goes into a part at the tokens of a prompt, and the states above all layers."""
        torch = torch_for(_NEEDED_BY)
        tokens = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        states = self._words[torch.tensor(tokens)][None]
        turned = self._turned(torch, 0, len(tokens))
        heard: dict[str, Any] = {}
        for i in range(self.num_layers):
            states, _ = self._layer(torch, i, states, turned, None, {}, heard)
        return heard[name], states[0]

    def information(self, states: Any) -> Any:
        """Fisher information of the next token in the stream above all layers, `(dim, dim)`.

        The mean over some states; each is as long as they are in the median.
        """
        torch = torch_for(_NEEDED_BY)
        probs = self._output(self._normed(torch, states, self._last)).float().softmax(-1)
        words = self._output.weight.float()
        means = probs @ words
        found = (words * probs.mean(0)[:, None]).T @ words - means.T @ means / len(probs)
        sizes = (states.float().pow(2).mean(-1) + self._eps).sqrt()
        scale = self._last.float() / sizes.median()
        return scale[:, None] * found * scale

    def losses(
        self, prompt: str, tokens: tuple[int, ...], adapters: Adapters, first: int
    ) -> tuple[Any, Any]:
        """Surprise at each token of a text and at its end, and whether each was the likeliest.

        Under autograd nobody asks which was, and none is.

        Args:
          prompt: What the text follows.
          tokens: Of the text.
          adapters: As they stand.
          first: The first adapted layer; the states beneath it are kept.
        """
        torch = torch_for(_NEEDED_BY)
        last, past = self.told(prompt)
        states = self._beneath(torch, prompt, (last, *tokens), past, first)
        turned = self._turned(torch, past[0][0].shape[1], len(tokens) + 1)
        for i in range(first, self.num_layers):
            states, _ = self._layer(torch, i, states, turned, past[i], adapters)
        return _surprise(torch, self._normed(torch, states[0], self._last), self._output)(
            torch.tensor([*tokens, self.end])
        )

    def beneath(
        self,
        prompt: str,
        texts: Sequence[tuple[int, ...]],
        first: int,
        length: int,
        *,
        kept_for: Hashable | None,
    ) -> Any:
        """States of texts under a layer, filled up to a length, `(num_texts, length, dim)`.

        They are made in one piece of as many rows as there are texts.

        Args:
          prompt: What the texts follow.
          texts: Tokens of each, fewer than `length`.
          first: The layer.
          length: Tokens of a row.
          kept_for: By what states are kept apart, for their last bits may hang on how many rows
            are made together; `None`: nothing is looked up or kept.
        """
        torch = torch_for(_NEEDED_BY)
        last, past = self.told(prompt)
        keys = [(prompt, text, first, length, kept_for) for text in texts]
        known = {key: self._kept[key] for key in keys if key in self._kept}
        filled = torch.zeros((len(texts), length), dtype=torch.long)
        for row, text in zip(filled, texts, strict=True):
            row[: len(text) + 1] = torch.tensor([last, *text])
        states = self._words[filled]
        if len(known) < len({*keys}):
            turned = self._turned(torch, past[0][0].shape[1], length)
            with torch.no_grad():
                for i in range(first):
                    states, _ = self._layer(torch, i, states, turned, past[i], {})
        for row, key in zip(states, keys, strict=True):
            if key in known:
                row[: len(key[1]) + 1] = known[key]
            elif kept_for is not None:
                self._keep(key, row[: len(key[1]) + 1])
        return states

    def surprises(
        self,
        prompt: str,
        texts: Sequence[tuple[int, ...]],
        states: Any,
        adapters: Adapters,
        first: int,
    ) -> tuple[Any, Any, Any]:
        """`losses` of several texts from their states under a layer, `(num_texts, length)` each.

        Third, whether a place holds a token of the text or its end: elsewhere nothing is said.
        """
        torch = torch_for(_NEEDED_BY)
        _, past = self.told(prompt)
        num, length, dim = states.shape
        turned = self._turned(torch, past[0][0].shape[1], length)
        for i in range(first, self.num_layers):
            states, _ = self._layer(torch, i, states, turned, past[i], adapters)
        wanted = torch.zeros((num, length), dtype=torch.long)
        is_told = torch.zeros((num, length), dtype=torch.bool)
        for row, told, text in zip(wanted, is_told, texts, strict=True):
            row[: len(text) + 1] = torch.tensor([*text, self.end])
            told[: len(text) + 1] = True
        flat = self._normed(torch, states.reshape(num * length, dim), self._last)
        lost, right = _surprise(torch, flat, self._output)(wanted.flatten())
        return lost.view(num, length), right.view(num, length), is_told

    def written(
        self, prompt: str, num: int, adapters: Adapters, *, max_tokens: int, seed: int
    ) -> list[str]:
        """So many texts after a prompt, by the model's own probabilities: no top-k, no top-p.

        They are written side by side. None ends before it began.
        """
        tokens: list[list[int]] = [[] for _ in range(num)]
        is_open = [True] * num
        with one_core(_NEEDED_BY) as torch:
            generator = torch.Generator()
            generator.manual_seed(seed)
            last, past = self.told(prompt)
            drawn, grown = torch.full((num,), last), list(past)
            ends = torch.tensor(sorted(self.ends))
            for place in range(max_tokens):
                states = self._words[drawn][:, None]
                turned = self._turned(torch, past[0][0].shape[1] + place, 1)
                for i in range(self.num_layers):
                    states, grown[i] = self._layer(torch, i, states, turned, grown[i], adapters)
                scores = self._output(self._normed(torch, states[:, 0], self._last)).float()
                if not place:
                    scores[:, ends] = -torch.inf
                drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
                for row, token in enumerate(drawn.tolist()):
                    is_open[row] = is_open[row] and token not in self.ends
                    if is_open[row]:
                        tokens[row].append(token)
                if not any(is_open):
                    break
        return [self.tokenizer.decode(own, skip_special_tokens=True).strip() for own in tokens]

    def _beneath(
        self, torch: Any, prompt: str, tokens: tuple[int, ...], past: Any, first: int
    ) -> Any:
        """States of one record under a layer, `(1, num_tokens, dim)`; kept while there is room."""
        key = (prompt, tokens, first)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with torch.no_grad():
            states = self._words[torch.tensor(tokens)][None]
            turned = self._turned(torch, past[0][0].shape[1], len(tokens))
            for i in range(first):
                states, _ = self._layer(torch, i, states, turned, past[i], {})
        return self._keep(key, states)

    def _keep(self, key: tuple[Any, ...], states: Any) -> Any:
        """States, in memory of their own; the oldest go where there is no room."""
        if key in self._kept:
            self._kept_bytes -= self._kept.pop(key).nbytes
        self._kept[key] = states = states.clone()
        self._kept_bytes += states.nbytes
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return states

    def _layer(
        self,
        torch: Any,
        i: int,
        states: Any,
        turned: Any,
        past: Any,
        adapters: Adapters,
        heard: dict[str, Any] | None = None,
    ) -> tuple[Any, tuple[Any, Any]]:
        """A layer on `(rows, num_tokens, dim)`, after what came before; keys and values so far.

        What goes into its parts is put into `heard`, if that is given.
        """
        weights, (heads, fewer) = self._layers[i], self._heads
        rows, length, dim = states.shape

        def through(part: str, x: Any) -> Any:
            if heard is not None:
                heard[f"{i}.{part}"] = x
            y = weights[_full(part)](x)
            if (found := adapters.get(f"{i}.{part}")) is not None:
                fixed, learned, metric = found
                few = (x @ fixed.T).view(*learned.shape[:-2], -1, fixed.shape[0])
                added = (few @ learned.mT.to(x.dtype)).view(y.shape)
                y = y + (added if metric is None else added @ metric.T)
            return y

        def split(part: str, x: Any, num: int) -> Any:
            return through(part, x).view(rows, length, num, self._head_dim).transpose(1, 2)

        flat = self._normed(torch, states.reshape(-1, dim), weights["input_layernorm"])
        query = _turn(torch, split("q_proj", flat, heads), turned)
        key = _turn(torch, split("k_proj", flat, fewer), turned)
        value = split("v_proj", flat, fewer)
        if past is not None:
            key, value = (
                torch.cat([old.expand(rows, *old.shape[-3:]), new], 2)
                for old, new in zip(past, (key, value), strict=True)
            )
        before = key.shape[2] - length
        sees = None
        if length > 1:
            sees = torch.ones((length, key.shape[2]), dtype=torch.bool).tril(before)
        seen = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=sees, enable_gqa=heads != fewer
        )
        added = through("o_proj", seen.transpose(1, 2).reshape(rows * length, -1))
        states = states + added.view(states.shape)
        flat = self._normed(torch, states.reshape(-1, dim), weights["post_attention_layernorm"])
        wide = torch.nn.functional.silu(through("gate_proj", flat)) * through("up_proj", flat)
        states = states + through("down_proj", wide).view(states.shape)
        return states, (key, value)

    def _normed(self, torch: Any, states: Any, scale: Any) -> Any:
        """States of like length."""
        return torch.nn.functional.rms_norm(states, states.shape[-1:], scale, self._eps)

    def _turned(self, torch: Any, start: int, length: int) -> tuple[Any, Any]:
        """Cosines and sines of places, `(length, head_dim)` each."""
        angles = torch.outer(torch.arange(start, start + length).float(), self._turns)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().bfloat16(), angles.sin().bfloat16()


@lru_cache(maxsize=1)
def frozen(where: Path) -> Frozen:
    """The model, the last one kept."""
    return Frozen(where)


def digest_of_weights(where: Path) -> bytes:
    """SHA-256 of the files that a model and its tokenizer are read from."""
    files = sorted(where.iterdir()) if where.is_dir() else [where]
    whole = hashlib.sha256()
    for file in files:
        if file.is_file() and file.name.endswith(_READ):
            stat = file.stat()
            whole.update(f"{sha256_of(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return whole.digest()


def tokens_of(model: Frozen, texts: Sequence[str], most: int) -> list[tuple[int, ...]]:
    """Tokens of each text, the first `most` of them; each from that text alone."""
    plain = (text.encode(errors="replace").decode() for text in texts)
    return [
        tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"][:most]) for text in plain
    ]


class _Linear:
    """A product with a weight that stays, `(outputs, inputs)`; gradients pass to its input."""

    def __init__(self, torch: Any, weight: Any) -> None:
        self.shape = tuple(weight.shape)
        self.weight = weight.contiguous()
        self._ahead = dense(self.weight, None)
        self._back: Callable[[Any], Any] | None = None
        self._function = _passing(torch)

    def __call__(self, x: Any) -> Any:
        """The product; under autograd only where it is needed."""
        if x.requires_grad:
            return self._function.apply(x, self)
        return self._ahead(x)

    def back(self, slope: Any) -> Any:
        """The product with the transpose."""
        if self._back is None:
            self._back = dense(self.weight.T.contiguous(), None)
        return self._back(slope)


@lru_cache(maxsize=1)
def _passing(torch: Any) -> Any:
    """The product as a function that autograd knows."""

    class Product(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, linear: _Linear) -> Any:
            ctx.linear = linear
            return linear._ahead(x)

        @staticmethod
        def backward(ctx: Any, slope: Any) -> Any:
            return ctx.linear.back(slope.contiguous()), None

    return Product


def _surprise(torch: Any, states: Any, output: _Linear) -> Callable[[Any], tuple[Any, Any]]:
    """Surprise at tokens after states; scores of the whole vocabulary are made once."""

    class Surprise(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, states: Any, tokens: Any) -> Any:
            probs = output._ahead(states).softmax(-1)
            rows = torch.arange(len(tokens))
            is_right = tokens < 0
            lost = -probs[rows, tokens].float().clamp_min(1e-30).log()
            if ctx.needs_input_grad[0]:
                ctx.save_for_backward(output.back(probs) - output.weight[tokens])
            else:
                is_right = probs[rows, tokens] == probs.amax(-1)
                is_right[is_right.clone()] = probs[is_right].argmax(-1) == tokens[is_right]
            ctx.mark_non_differentiable(is_right)
            return lost, is_right

        @staticmethod
        def backward(ctx: Any, slope: Any, _: Any) -> Any:
            (toward,) = ctx.saved_tensors
            return toward * slope[:, None].to(toward.dtype), None

    def of(tokens: Any) -> tuple[Any, Any]:
        lost, is_right = Surprise.apply(states, tokens)
        return lost, is_right

    return of


def _turn(torch: Any, x: Any, turned: tuple[Any, Any]) -> Any:
    """Rotary embedding."""
    cosines, sines = turned
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


@lru_cache(maxsize=64)
def _told(model: Frozen, prompt: str) -> tuple[int, list[tuple[Any, Any]]]:
    """`Frozen.told`, once a prompt."""
    tokens = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    past: list[tuple[Any, Any]] = []
    torch = torch_for(_NEEDED_BY)
    with torch.inference_mode(False), torch.no_grad():  # gradients may pass by them later
        states = model._words[torch.tensor(tokens[:-1])][None]
        turned = model._turned(torch, 0, len(tokens) - 1)
        for i in range(model.num_layers):
            states, (key, value) = model._layer(torch, i, states, turned, None, {})
            past.append((key[0], value[0]))
    return int(tokens[-1]), past


def _full(part: str) -> str:
    """Name of a part within its layer."""
    return f"self_attn.{part}" if part in PARTS[:4] else f"mlp.{part}"
