# SPDX-License-Identifier: Apache-2.0
"""The files of a release: plain names inside one folder, each known by its hash.

Nothing in a file is parsed before its size and hash were found to be those that are listed, and
no name leads out of the folder, through a link, or to anything but a plain file.
"""

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..core.errors import SecurityRefusal

SUMS = "SHA256SUMS"

_MAX_BYTES = 1 << 28  # of the files whose size no other file states
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}(/(?!\.)[A-Za-z0-9._-]{1,128}){0,3}")
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


def is_name(name: str) -> bool:
    """Whether a release may hold a file of this name."""
    return _NAME.fullmatch(name) is not None


def files_in(folder: Path) -> Iterator[Path]:
    """All that is in a folder but folders, and what a file browser leaves behind."""
    return (
        path
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and not path.name.startswith(".")
    )


def read(folder: Path, name: str, *, sha256: str, num_bytes: int | None = None) -> bytes:
    """A file's content, once its size and its hash are what they should be.

    Raises:
      SecurityRefusal: They are not, or it is no plain file; names the file.
    """
    with _opened(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES if num_bytes is None else size != num_bytes:
            raise SecurityRefusal(f"{name} was changed: it has another size than is listed")
        content = file.read(size)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SecurityRefusal(f"{name} was changed: it does not match its hash in {SUMS}")
    return content


def digest(folder: Path, name: str) -> str:
    """SHA-256 of a file, whatever its size.

    Raises:
      SecurityRefusal: It is no plain file.
    """
    with _opened(folder, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(folder: Path) -> dict[str, str]:
    """Hashes by name, from `SHA256SUMS`.

    Raises:
      SecurityRefusal: It is not, byte for byte, a list that `list_text` makes.
    """
    with _opened(folder, SUMS) as file:
        content = file.read(_MAX_BYTES)
    lines = [_LINE.fullmatch(line) for line in content.decode("utf-8", "replace").split("\n")[:-1]]
    found = {match[2]: match[1] for match in lines if match}
    if list_text(found) != content:
        raise SecurityRefusal(f"{SUMS} was changed: it is not a list of hashes as a release has it")
    if not all(is_name(name) for name in found):
        raise SecurityRefusal(f"{SUMS} lists a file name that is not allowed")
    return found


def list_text(found: Mapping[str, str]) -> bytes:
    """The content of `SHA256SUMS`, which `sha256sum -c` reads too."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(found.items())).encode()


def write(folder: Path, name: str, content: bytes) -> None:
    """A new file."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def _opened(folder: Path, name: str) -> io.BufferedReader:
    """A plain file of the release, open for reading."""
    if not is_name(name):
        raise SecurityRefusal(f"{name!r} is not a name that a release may hold")
    inner = Path(name).parent
    try:
        if any((folder / part).is_symlink() for part in [inner, *inner.parents] if part.name):
            raise SecurityRefusal(f"{name} is reached through a link")
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SecurityRefusal(f"{name} cannot be read: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise SecurityRefusal(f"{name} is not a plain file")
    return file
