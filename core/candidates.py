# SPDX-License-Identifier: Apache-2.0
"""Synthetic records that public models propose and vary, of public and released values only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .schema import Schema
from .texts import packed, unpacked

_EXTRA = "extra."


@dataclass(frozen=True)
class Candidates:
    """Synthetic records that may go anywhere, as they come from public randomness and noisy sums.

    A type of its own, so that private records cannot be handed to a public model by mistake: a
    model may be remote, and what it is shown is given away.

    Attributes:
      codes: Cell of each table column, `(num_candidates, num_columns)`, int32.
      images: `(num_candidates, height, width, channels)`, uint8, or `None`.
      texts: `(num_candidates,)`, each a `str`, or `None`.
      extras: What their model needs to vary them, by name, one row a candidate: the strokes of a
        drawing, the latent vector of an image. Clients never see it.
    """

    codes: NDArray[np.int32]
    images: NDArray[np.uint8] | None = None
    texts: NDArray[np.object_] | None = None
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, index: NDArray[np.int64] | slice) -> "Candidates":
        """The candidates at `index`."""
        return Candidates(
            self.codes[index],
            None if self.images is None else self.images[index],
            None if self.texts is None else self.texts[index],
            {name: rows[index] for name, rows in self.extras.items()},
        )

    @staticmethod
    def joined(parts: Sequence["Candidates"]) -> "Candidates":
        """Candidates of the same kind, one after the other; at least one part."""
        images = [part.images for part in parts if part.images is not None]
        texts = [part.texts for part in parts if part.texts is not None]
        return Candidates(
            np.concatenate([part.codes for part in parts]),
            np.concatenate(images) if images else None,
            np.concatenate(texts) if texts else None,
            {n: np.concatenate([part.extras[n] for part in parts]) for n in parts[0].extras},
        )

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Plain arrays that `restore` reads back."""
        arrays: dict[str, NDArray[Any]] = {"codes": self.codes}
        if self.images is not None:
            arrays["images"] = self.images
        if self.texts is not None:
            arrays["texts"], arrays["text_starts"] = packed(self.texts)
        return arrays | {_EXTRA + name: rows for name, rows in self.extras.items()}

    @staticmethod
    def restore(schema: Schema, tensors: Mapping[str, NDArray[Any]]) -> "Candidates":
        """The candidates that plain arrays hold; arrays of other names are left alone.

        Raises:
          DataError: They are none of this schema.
        """
        if "codes" not in tensors:
            raise DataError("candidates without codes")
        texts = None
        if schema.text is not None:
            if not {"texts", "text_starts"} <= set(tensors):
                raise DataError("candidates without texts")
            texts = unpacked(tensors["texts"], tensors["text_starts"])
        found = Candidates(
            tensors["codes"],
            None if schema.image is None else tensors.get("images"),
            texts,
            {n.removeprefix(_EXTRA): t for n, t in tensors.items() if n.startswith(_EXTRA)},
        )
        found.check(schema)
        return found

    def check(self, schema: Schema) -> None:
        """Refuse what is not candidates of a schema, as a faulty model may make them.

        Raises:
          DataError: An array is missing, too many, or of another shape, type or range.
        """
        codes, images, texts = self.codes, self.images, self.texts
        shape = None if schema.image is None else schema.image.shape
        wrong = {
            "codes": codes.dtype != np.int32
            or codes.shape != (len(codes), len(schema.columns))
            or not ((codes >= 0) & (codes < np.array(schema.shape, dtype=np.int64))).all(),
            "images": (images is None) != (shape is None)
            or (
                images is not None
                and (images.dtype != np.uint8 or images.shape != (len(codes), *(shape or ())))
            ),
            "texts": (texts is None) != (schema.text is None)
            or (
                texts is not None
                and (texts.shape != (len(codes),) or not all(map(_is_text, texts)))
            ),
            "extras": any(len(rows) != len(codes) for rows in self.extras.values()),
        }
        if bad := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise DataError(f"candidates whose {' and '.join(bad)} do not fit the schema")


def _is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8 can hold."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
