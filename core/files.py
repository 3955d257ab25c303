# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whenever a process dies."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes, *, is_secret: bool = False) -> None:
    """Write a file: whole or not at all, and on the disk when this returns.

    Args:
      path: Where; a file that is there is replaced.
      content: What.
      is_secret: Whether the owner alone may read it.

    Raises:
      OSError: It cannot be written; what was there before is there still.
    """
    partial = path.with_name(f"{path.name}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    descriptor = os.open(partial, flags, 0o600 if is_secret else 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
