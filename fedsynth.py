# SPDX-License-Identifier: Apache-2.0
"""Make this checkout importable as `fedsynth` without installing it."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
from fedsynth.__init__ import __all__, __getattr__, __version__  # noqa: F401
