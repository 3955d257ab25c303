# SPDX-License-Identifier: Apache-2.0
"""A small language model for devices, trained on public or released texts: what they are worth.

About a million weights: a recurrent network over tokens of a few bytes. It is what a synthetic
corpus is made for where no large model can run, as a keyboard's suggestions; and how often it
guesses the next token of real texts that it has not seen says how good the corpus is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError, DataError
from .one_core import one_core

_START, _END = 0, 1
_MARKS = ("<start>", "<end>")
_NAME = "small_model"
_FILES = ("model.safetensors", "small_model.json")
_BATCH = 16
_CHUNK = 16 * _BATCH  # texts that are sorted by length, so that a batch is of like ones
_HELD_OUT, _LEAST_HELD_OUT = 10, 20  # one text in so many, and no fewer, say when to stop
_CLIP = 1.0
_PATIENCE = 2  # passes in a row that may bring nothing
_MANY = 64  # texts scored at a time


@dataclass(frozen=True)
class Shape:
    """How large a model is.

    Attributes:
      vocabulary: Most tokens; 256 of them are the bytes.
      dim: Of a token's embedding and of the network's state.
      layers: Of the network.
      max_tokens: Where a text is cut off.
    """

    vocabulary: int = 2048
    dim: int = 256
    layers: int = 1
    max_tokens: int = 64

    def __post_init__(self) -> None:
        """Refuse a shape that is none."""
        if not (
            258 <= self.vocabulary <= 65_536
            and 1 <= self.dim <= 4096
            and 1 <= self.layers <= 8
            and 2 <= self.max_tokens <= 4096
        ):
            raise ConfigError(
                "a small model needs vocabulary of 258 to 65,536, dim of 1 to 4,096, layers of 1 to"
                f" 8 and max_tokens of 2 to 4,096, not {self}"
            )


@dataclass(frozen=True, eq=False)
class SmallModel:
    """Guesses each next token of a text.

    Attributes:
      shape: How large it is.
      tokens: The tokenizer, as the package tokenizers writes it in JSON.
      weights: By name, float32.

    Privacy:
      As public as the texts that it was trained on: train it on public or released ones.
    """

    shape: Shape
    tokens: str
    weights: Mapping[str, NDArray[np.float32]]

    def next_token_accuracy(self, texts: Sequence[str]) -> float:
        """Share of all next tokens, the end of each text among them, that it guesses right.

        Raises:
          DataError: There are no texts.
        """
        if not len(texts):
            raise DataError("there are no texts to guess the tokens of")
        right, total = self.guesses(texts).sum(axis=0)
        return float(right / total)

    def guesses(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each text that were guessed right, and all of them, `(num_texts, 2)`."""
        found = np.zeros((len(texts), 2), dtype=np.int64)
        rows = self.encoded(texts)
        order = np.argsort([len(row) for row in rows], kind="stable")
        with one_core(_NAME) as torch:
            network = _network(torch, self)
            for start in range(0, len(order), _MANY):
                part = order[start : start + _MANY]
                given, wanted = _padded([rows[i] for i in part])
                guessed = _logits(torch, network, given).argmax(dim=-1).numpy()
                is_token = wanted >= 0
                found[part, 0] = ((guessed == wanted) & is_token).sum(axis=1)
                found[part, 1] = is_token.sum(axis=1)
        return found

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text between a mark for its start and one for its end."""
        plain = [text.encode(errors="replace").decode() for text in texts]
        most = self.shape.max_tokens
        read = self._tokenizer.encode_batch(plain)
        return [[_START, *encoding.ids[:most], _END] for encoding in read]

    def save(self, folder: Path) -> None:
        """Write `model.safetensors` and `small_model.json` into a folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.weights), folder / _FILES[0])
        told = {"shape": asdict(self.shape), "tokenizer": json.loads(self.tokens)}
        (folder / _FILES[1]).write_text(json.dumps(told), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "SmallModel":
        """The model that was saved.

        Raises:
          ConfigError: The files are not there, or not those of one.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            told = json.loads((folder / _FILES[1]).read_text(encoding="utf-8"))
            shape, tokens = Shape(**told["shape"]), json.dumps(told["tokenizer"])
            model = SmallModel(shape, tokens, load_file(folder / _FILES[0]))
            wanted = {name: size for name, size, _ in _parts(shape)}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"{folder} holds no small model: {error}") from error
        came = {name: array.shape for name, array in model.weights.items()}
        if came != wanted or model._tokenizer.get_vocab_size() > shape.vocabulary:
            raise ConfigError(f"{folder} holds a small model whose parts do not fit together")
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer, which neither cuts nor pads."""
        return _tokenizers().Tokenizer.from_str(self.tokens)


def fine_tune(
    texts: Sequence[str],
    base: SmallModel | None = None,
    *,
    seed: int = 0,
    shape: Shape | None = None,
    epochs: int = 8,
    learning_rate: float = 2e-3,
) -> SmallModel:
    """A small model of texts, from scratch or from a base whose tokens and shape it keeps.

    A tenth of the texts is held out; training stops once two passes in a row do not make it more
    likely, and the weights are those that made it most likely. The same texts and seed give the
    same weights on the same machine. 2,000 short messages take a CPU-minute.

    Args:
      texts: Public or released; 40 or more.
      base: A model of public texts, or `None`: tokens are learned from these texts too.
      seed: Of the first weights and of the order of texts.
      shape: Without a base: how large; `None`: as `Shape` says.
      epochs: Most passes over the texts.
      learning_rate: Of the first pass; it falls to a tenth.

    Raises:
      ConfigError: torch or tokenizers is missing, or a number is out of range.
      DataError: There are too few texts.

    Privacy:
      None is added here: never give it a shard's texts, but for a bound in a simulation.
    """
    if not 1 <= epochs <= 1000 or not 0 < learning_rate < 1:
        raise ConfigError(
            f"epochs must be 1 to 1,000 and learning_rate between 0 and 1, not {epochs!r} and"
            f" {learning_rate!r}"
        )
    if base is not None and shape is not None:
        raise ConfigError("a base has a shape of its own: leave shape out")
    held_out = max(_LEAST_HELD_OUT, len(texts) // _HELD_OUT)
    if len(texts) < 2 * held_out:
        raise DataError(f"a small model needs {2 * _LEAST_HELD_OUT} texts or more to learn from")
    rng = np.random.default_rng(seed)
    model = base or _new(texts, shape or Shape(), rng)
    order = rng.permutation(len(texts))
    rows = model.encoded([texts[i] for i in order])
    with one_core(_NAME, learns=True) as torch:
        network = _network(torch, model)
        trained = [weight.requires_grad_() for weight in network.values()]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
        useless, best, least = 0, dict(model.weights), _loss_of(torch, network, rows[:held_out])
        if base is None:
            least = np.inf
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.1 ** (epoch / max(1, epochs - 1))
            for batch in _batches(rows[held_out:], rng):
                optimizer.zero_grad()
                _loss(torch, network, batch).backward()
                torch.nn.utils.clip_grad_norm_(trained, _CLIP)
                optimizer.step()
            loss = _loss_of(torch, network, rows[:held_out])
            useless = 0 if loss < least else useless + 1
            if useless == _PATIENCE:
                break
            if useless:
                continue
            least = loss
            best = {name: w.detach().numpy().copy() for name, w in network.items()}
    return SmallModel(model.shape, model.tokens, best)


def _new(texts: Sequence[str], shape: Shape, rng: np.random.Generator) -> SmallModel:
    """A model with tokens of these texts, and random weights."""
    library = _tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=list(_MARKS),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (text.encode(errors="replace").decode() for text in texts)
    tokenizer.train_from_iterator(plain, trainer)
    weights = {
        name: rng.uniform(-reach, reach, size).astype(np.float32)
        for name, size, reach in _parts(shape)
    }
    return SmallModel(shape, tokenizer.to_str(), weights)


def _parts(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, size and first reach of each array of weights; output weights are the embeddings."""
    reach = shape.dim**-0.5
    yield "embeddings", (shape.vocabulary, shape.dim), reach
    yield "output_bias", (shape.vocabulary,), 0.0
    for layer in range(shape.layers):
        for part in ("input", "state"):
            yield f"{layer}.{part}", (3 * shape.dim, shape.dim), reach
        for part in ("input_bias", "state_bias"):
            yield f"{layer}.{part}", (3 * shape.dim,), reach


def _network(torch: Any, model: SmallModel) -> dict[str, Any]:
    """The weights as tensors of their own."""
    return {name: torch.from_numpy(array.copy()) for name, array in model.weights.items()}


def _logits(torch: Any, network: Mapping[str, Any], given: NDArray[np.int64]) -> Any:
    """Scores of each next token, `(num_texts, num_tokens, vocabulary)`."""
    states = network["embeddings"][torch.from_numpy(given)]
    layers = len({name.partition(".")[0] for name in network if name[0].isdigit()})
    parts = [
        network[f"{layer}.{part}"]
        for layer in range(layers)
        for part in ("input", "state", "input_bias", "state_bias")
    ]
    first = states.new_zeros((layers, len(given), states.shape[-1]))
    states, _ = torch.gru(states, first, parts, True, layers, 0.0, False, False, True)
    return states @ network["embeddings"].T + network["output_bias"]


def _loss(torch: Any, network: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> Any:
    """Mean surprise at the next tokens of some texts."""
    given, wanted = _padded(rows)
    scores = _logits(torch, network, given)
    return torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), torch.from_numpy(wanted).flatten(), ignore_index=-1
    )


def _loss_of(torch: Any, network: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> float:
    """The same of many texts, each batch of them weighing alike."""
    with torch.no_grad():
        parts = [rows[i : i + _MANY] for i in range(0, len(rows), _MANY)]
        return float(np.mean([float(_loss(torch, network, part)) for part in parts]))


def _padded(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens that are given and those that follow each, -1 behind a text's end."""
    longest = max(map(len, rows))
    given = np.full((len(rows), longest - 1), _END, dtype=np.int64)
    wanted = np.full((len(rows), longest - 1), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        given[i, : len(row) - 1] = row[:-1]
        wanted[i, : len(row) - 1] = row[1:]
    return given, wanted


def _batches(
    rows: Sequence[Sequence[int]], rng: np.random.Generator
) -> Iterator[list[Sequence[int]]]:
    """All texts in a random order, those of like lengths together."""
    order = rng.permutation(len(rows))
    for start in range(0, len(order), _CHUNK):
        chunk = sorted(order[start : start + _CHUNK].tolist(), key=lambda i: len(rows[i]))
        starts = np.arange(0, len(chunk), _BATCH)
        for first in rng.permutation(starts).tolist():
            yield [rows[i] for i in chunk[first : first + _BATCH]]


def _tokenizers() -> Any:
    """The package, loaded when it is first needed.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("small_model needs tokenizers: pip install 'fedsynth[train]'") from error
    return tokenizers
