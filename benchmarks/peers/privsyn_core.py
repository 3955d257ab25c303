# SPDX-License-Identifier: Apache-2.0
"""Drive privsyn-core: PrivSyn with GUM, defaults of the package. It uses the exact record count."""

import pandas as pd
from privsyn import PrivSynModel
from protocol import drive


def learn(codes, domain, args):
    """PrivSyn's synthetic codes."""
    table = pd.DataFrame(codes, columns=list(domain))
    model = PrivSynModel(epsilon=args.epsilon, delta=args.delta, random_state=args.seed)
    return model.fit(table, domain).sample(len(codes))[list(domain)].to_numpy()


if __name__ == "__main__":
    drive(learn)
