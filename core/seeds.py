# SPDX-License-Identifier: Apache-2.0
"""Public randomness of a run: separate streams of the one seed that its card names.

None of it protects anybody: noise and sampling coins come from `core.randomness`. Whoever has
the card can draw the same streams, and so learn and sample a release again.
"""

import numpy as np

_ROUNDS, _SAMPLE = 1, 2


def rounds_rng(seed: int) -> np.random.Generator:
    """Randomness of a strategy's server half."""
    return np.random.default_rng([seed, _ROUNDS])


def sample_rng(seed: int) -> np.random.Generator:
    """Randomness of the released records: first their codes, then values within cells."""
    return np.random.default_rng([seed, _SAMPLE])
