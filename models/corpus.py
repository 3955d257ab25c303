# SPDX-License-Identifier: Apache-2.0
"""A public corpus as a model: its candidates are the corpus' own texts, none of them twice."""

import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.candidates import Candidates
from ..core.column import Column
from ..core.errors import ConfigError
from ..core.generation import Subject
from ..core.open_codes import cut_text
from ..core.schema import Schema
from ..core.texts import as_texts
from .variation import Capabilities, VariationModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus(VariationModel):
    """Draws from a file of public texts without repetition; varies nothing.

    The file is read where candidates are made, at the server. What was drawn is recorded with the
    run, so that a replay needs no file.

    Attributes:
      path: A file of JSON lines, in UTF-8, also packed as `.gz`: one object a line, with the text
        and, for each column of the schema, a category.
      text: Key of the text; empty: the name of the schema's text column.
    """

    path: str = ""
    text: str = ""
    name: ClassVar[str] = "corpus"

    def check(self, subject: Subject) -> None:
        """Refuse a schema that lines of text and categories do not make, and a file that is not.

        Raises:
          ConfigError: There is no such file, no text column, or a column of numbers.
        """
        super().check(subject)
        for column in subject.schema.columns:
            if not column.is_categorical:
                raise ConfigError(
                    f"model 'corpus' fills categories in, and column {column.name!r} is a"
                    f" {column.kind}"
                )
        if not self.path or not Path(self.path).is_file():
            raise ConfigError(
                f"model 'corpus' needs a file of public texts, and there is none at {self.path!r}:"
                " set path in model_settings"
            )

    def capabilities(self) -> Capabilities:
        """Texts, from a file that another machine need not have."""
        return Capabilities("text", is_exact=False)

    def random(self, blank: Candidates, subject: Subject, rng: np.random.Generator) -> Candidates:
        """Texts of the corpus, each once, with their categories.

        Raises:
          ConfigError: A line cannot be read, or there are too few texts (of a label).
        """
        texts, codes = self._read(subject.schema)
        chosen = np.zeros(len(blank), dtype=np.int64)
        groups = np.zeros(len(blank), dtype=np.int64)
        of_corpus = np.zeros(len(texts), dtype=np.int64)
        if subject.label >= 0:
            groups = blank.codes[:, subject.label].astype(np.int64)
            of_corpus = codes[:, subject.label].astype(np.int64)
        for group in np.unique(groups):
            wanted, there = np.flatnonzero(groups == group), np.flatnonzero(of_corpus == group)
            if len(there) < len(wanted):
                raise ConfigError(
                    f"model 'corpus': {len(wanted):,} different texts are wanted, and"
                    f" {self.path} has {len(there):,} that fit; take fewer candidates"
                )
            chosen[wanted] = rng.permutation(there)[: len(wanted)]
        return replace(blank, codes=codes[chosen], texts=as_texts(texts[i] for i in chosen))

    def vary(
        self, candidates: Candidates, degree: float, subject: Subject, rng: np.random.Generator
    ) -> Candidates:
        """The candidates as they are: there is nothing between a corpus' texts."""
        return candidates

    def _read(self, schema: Schema) -> tuple[list[str], NDArray[np.int32]]:
        """Different texts of the corpus in its order, and their categories' cells."""
        key = self.text or ("text" if schema.text is None else schema.text.name)
        most = 1000 if schema.text is None else schema.text.max_bytes
        found: dict[str, list[int]] = {}
        num_lines = 0
        for number, line in self._lines():
            num_lines += 1
            text = line.get(key)
            if not isinstance(text, str):
                raise ConfigError(f"{self.path}, line {number}: no text under {key!r}")
            cells = [_cell(column, line.get(column.name)) for column in schema.columns]
            if text.strip() and min(cells, default=0) >= 0:
                found.setdefault(cut_text(text, most), cells)
        if left_out := num_lines - len(found):
            _log.info(
                "corpus: %d of %d lines left out, empty, told before, or of no declared category",
                *(left_out, num_lines),
            )
        codes = np.array(list(found.values()), dtype=np.int32)
        return list(found), codes.reshape(len(found), len(schema.columns))

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Objects of the file, with the numbers of their lines from 1.

        Raises:
          ConfigError: The file is not there, or a line is no object in UTF-8.
        """
        number = 0
        try:
            content = Path(self.path).read_bytes()
            if self.path.endswith(".gz"):
                content = gzip.decompress(content)
            for number, line in enumerate(content.splitlines(), start=1):
                if line.strip():
                    read = json.loads(line.decode())
                    if not isinstance(read, dict):
                        raise ConfigError(f"{self.path}, line {number}: not a JSON object")
                    yield number, read
        except (OSError, EOFError) as error:
            raise ConfigError(f"model 'corpus' cannot read {self.path}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{self.path}, line {number}: {error}") from error


def _cell(column: Column, value: Any) -> int:
    """Cell of a category by its name; -1 where it has none."""
    if value is None:
        return column.num_cells - 1 if column.missing else -1
    named = str(value).lower() if isinstance(value, bool) else str(value)
    if named in column.categories:
        return column.categories.index(named)
    return column.categories.index(column.other) if column.other else -1
