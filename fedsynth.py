# SPDX-License-Identifier: Apache-2.0
"""Make this checkout importable as `fedsynth` without installing it."""

# First of all, and by no import: another thread may ask for a part of the package meanwhile.
__path__ = [__file__.removesuffix("fedsynth.py") or "."]

from fedsynth.__init__ import __all__, __getattr__, __version__  # noqa: F401
