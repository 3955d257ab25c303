# SPDX-License-Identifier: Apache-2.0
"""Be the command `fedsynth`, as `python -m fedsynth`."""

from .simulation.cli import main

if __name__ == "__main__":
    main()
