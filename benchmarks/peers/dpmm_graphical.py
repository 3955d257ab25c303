# SPDX-License-Identifier: Apache-2.0
"""Drive dpmm's MST or AIM on codes, in one process, with the package's defaults otherwise.

AIM is held to a model of 2 MB: at its default of 80 MB no result came in any time we could give.
"""

import numpy as np
import pandas as pd
from dpmm.models.aim import AIMGM
from dpmm.models.mst import MSTGM
from protocol import drive

AIM_MODEL_MB = 2


def learn(codes, domain, args):
    """The synthetic codes of `--method mst` or `--method aim`."""
    privacy = {"epsilon": args.epsilon, "delta": args.delta, "n_jobs": 1}
    model = (
        MSTGM(**privacy) if args.method == "mst" else AIMGM(**privacy, max_model_size=AIM_MODEL_MB)
    )
    table = pd.DataFrame(codes, columns=list(domain))
    model.set_random_state(np.random.RandomState(args.seed))
    model.set_domain(domain)
    model.fit(table)
    return model.generate(n_records=len(codes))[list(domain)].to_numpy()


if __name__ == "__main__":
    drive(learn)
