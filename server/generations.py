# SPDX-License-Identifier: Apache-2.0
"""Keep what public models made, so that a run that is resumed or replayed has the same candidates.

A model's answer is on the disk, under the digest of its request, before a strategy sees it. What a
killed run had been given is taken from there again: nothing is generated, or paid for, twice.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..core.answering import Source
from ..core.candidates import Candidates
from ..core.errors import DataError, SecurityRefusal
from ..core.failpoints import at
from ..core.files import write_whole
from ..core.generation import Generation
from ..models.live import make
from .transcript import tensors_in

_REQUEST = "request"


def name_of(number: int) -> str:
    """File that holds a run's generation of this number, from 1."""
    return f"generations/{number:06d}.safetensors"


def kept(folder: Path, ask: Callable[[Generation, Path], Candidates] = make) -> Source:
    """What answers a run's generations: from its folder those that are kept there, else the model.

    Args:
      folder: The run's working folder.
      ask: What asks a model.

    Raises (when called):
      SecurityRefusal: What is kept answers another request.
    """
    number = 0

    def source(request: Generation) -> Candidates:
        nonlocal number
        number += 1
        path = folder / name_of(number)
        if path.exists():
            return _read(path.read_bytes(), path.name, request)
        made = ask(request, folder)
        at("before-generation")
        _write(path, request, made)
        at("after-generation")
        return made

    return source


def recorded(contents: Mapping[str, bytes]) -> Source:
    """What answers a replay's generations: the files of a release, by name.

    Raises (when called):
      SecurityRefusal: A generation is missing, or answers another request.
    """
    number = 0

    def source(request: Generation) -> Candidates:
        nonlocal number
        number += 1
        name = name_of(number)
        if name not in contents:
            raise SecurityRefusal(f"there is no {name}, which the method asks for")
        return _read(contents[name], name, request)

    return source


def files_of(folder: Path) -> dict[str, bytes]:
    """All generations that a run has kept, by name."""
    return {
        f"generations/{path.name}": path.read_bytes()
        for path in sorted((folder / "generations").glob("*.safetensors"))
    }


def clear(folder: Path) -> None:
    """Remove what a finished run had kept; its release holds it."""
    generations = folder / "generations"
    for path in [*generations.glob("*"), *folder.glob("replies.db*")]:
        path.unlink(missing_ok=True)
    if generations.exists():
        generations.rmdir()


def _write(path: Path, request: Generation, made: Candidates) -> None:
    """Store a generation."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(rows) for name, rows in made.tensors().items()}
    tensors[_REQUEST] = np.frombuffer(bytes.fromhex(request.digest), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, save(tensors))


def _read(content: bytes, name: str, request: Generation) -> Candidates:
    """A stored generation, once it is shown to answer the request."""
    tensors = tensors_in(name, content)
    digest = tensors.pop(_REQUEST, np.zeros(0, dtype=np.uint8))
    if digest.tobytes().hex() != request.digest:
        raise SecurityRefusal(
            f"{name} answers another request than the method makes; go on with the versions and"
            " settings that the run was begun with"
        )
    try:
        made = Candidates.restore(request.subject.schema, tensors)
    except DataError as error:
        raise SecurityRefusal(f"{name} holds {error}") from error
    if len(made) != len(request.candidates):
        wanted = len(request.candidates)
        raise SecurityRefusal(f"{name} holds {len(made)} candidates; {wanted} were asked for")
    return made
