# SPDX-License-Identifier: Apache-2.0
"""Training goes on from a checkpoint to the bit, whatever moves its weights and its clip."""

from dataclasses import replace

import numpy as np
import pytest
from fedsynth.core.answering import answered
from fedsynth.core.errors import ConfigError
from fedsynth.core.query import NoisySum
from fedsynth.core.schema import Column, Schema
from fedsynth.strategies.dp_fedavg import DpFedAvg

pytest.importorskip("torch")
SCHEMA = Schema((Column("c", "category", "public: made up", categories=("a", "b", "c")),))
SMALL = DpFedAvg(num_users=20, num_rounds=8, sampling_prob=1.0, hidden=3, latent=2)
WAYS = {
    "fedavg": replace(SMALL, server_optimizer="fedavg"),
    "fedavgm": replace(SMALL, server_optimizer="fedavgm"),
    "fedadam": SMALL,
    "fedyogi": replace(SMALL, server_optimizer="fedyogi"),
    "fedadagrad": replace(SMALL, server_optimizer="fedadagrad"),
    "a clip that follows": replace(SMALL, clip_quantile=0.5),
    "banded noise": replace(SMALL, correlation="banded", separation=4),
    "blt noise": replace(SMALL, correlation="blt", separation=4),
}


def driven(rounds, sums):
    """What a strategy learns of given sums, the queries it asks, and its checkpoints."""
    queries, kept = [], {}
    steps = answered(rounds, None, lambda checkpoint, n: kept.update({n: checkpoint.state()}))
    query = next(steps)
    while True:
        queries.append(query)
        vector = sums[len(queries) - 1][: query.dim]
        noisy = NoisySum.void(query) if np.isnan(vector).any() else NoisySum(vector, 1.0, 2)
        try:
            query = steps.send(noisy)
        except StopIteration as end:
            return end.value, queries, kept


def sums_of(strategy):
    """Made-up noisy sums of all rounds, the third of them void."""
    dim = strategy.model_for(strategy_shape()).num_weights + 1
    sums = np.random.default_rng(1).normal(size=(strategy.num_rounds, dim))
    sums[2] = np.nan
    return sums


def strategy_shape():
    from fedsynth.strategies.parts.trainable import RecordShape

    return RecordShape.of(SCHEMA)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("done", [1, 3, 5, 8])
def test_a_training_that_goes_on_ends_and_asks_as_one_that_never_stopped(way, done):
    strategy, sums = WAYS[way], sums_of(WAYS[way])
    whole, asked, kept = driven(
        strategy.rounds_from(SCHEMA, 1.0, np.random.default_rng(0), None), sums
    )

    rounds = strategy.rounds_from(SCHEMA, 1.0, np.random.default_rng(9), kept[done])
    if done == strategy.num_rounds:
        with pytest.raises(StopIteration) as end:
            next(rounds)
        learned, again = end.value.value, []
    else:
        learned, again, _ = driven(rounds, sums[done:])

    assert learned.tensors()["weights"].tobytes() == whole.tensors()["weights"].tobytes()
    for mine, theirs in zip(again, asked[done:], strict=True):
        assert (mine.clip, mine.turn, mine.dim) == (theirs.clip, theirs.turn, theirs.dim)
        assert mine.inputs["weights"].tobytes() == theirs.inputs["weights"].tobytes()


def test_a_checkpoint_of_another_model_is_refused_by_its_size():
    strategy = WAYS["fedadam"]
    _, _, kept = driven(
        strategy.rounds_from(SCHEMA, 1.0, np.random.default_rng(0), None), sums_of(strategy)
    )
    larger = replace(strategy, hidden=4)

    with pytest.raises(ConfigError, match="a checkpoint of another model"):
        next(larger.rounds_from(SCHEMA, 1.0, np.random.default_rng(0), kept[3]))


def test_a_checkpoint_holds_no_sum_of_any_client():
    strategy = WAYS["banded noise"]
    _, _, kept = driven(
        strategy.rounds_from(SCHEMA, 1.0, np.random.default_rng(0), None), sums_of(strategy)
    )

    assert {key.split(".")[0] for key in kept[5]} == {
        "weights",
        "position",
        "optimizer",
        "decoder",
        "mean",
    }
