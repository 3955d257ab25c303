# SPDX-License-Identifier: Apache-2.0
"""Make this checkout `fedsynth` without installing it: to import, and as `python -m fedsynth`."""

# First of all, and by no import: another thread may ask for a part of the package meanwhile.
__path__ = [__file__.removesuffix("fedsynth.py") or "."]

from fedsynth.__init__ import __all__, __getattr__, __version__  # noqa: F401

if __name__ == "__main__":
    from fedsynth.simulation.cli import main

    main()
