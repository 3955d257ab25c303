# SPDX-License-Identifier: Apache-2.0
"""Drive SmartNoise's MST on codes, its categories declared, nothing spent on preprocessing.

smartnoise-synth 1.0.8 pins mbi below 2 and gets 1.1.0, whose sampler gives records of equal
parents the low ranks of every child column together: columns that should be independent given
their parent come out correlated. Its pairs are therefore further off than independent columns.
"""

import numpy as np
import pandas as pd
from protocol import drive
from snsynth import Synthesizer


def learn(codes, domain, args):
    """MST's synthetic codes."""
    names = list(domain)
    np.random.seed(args.seed)  # noqa: NPY002  (it draws from numpy's global generator)
    table = pd.DataFrame(codes, columns=names)
    model = Synthesizer.create("mst", epsilon=args.epsilon, delta=args.delta)
    model.fit(table, categorical_columns=names, preprocessor_eps=0.0)
    return model.sample(len(codes))[names].to_numpy()


if __name__ == "__main__":
    drive(learn)
