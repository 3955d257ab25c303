# SPDX-License-Identifier: Apache-2.0
"""Decoded rounds of real clients carry noise of the covariance that a wrong one would not fit."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from fedsynth.core import accounting
from fedsynth.core.config import parse_config
from fedsynth.core.query import MOST_IN_SERIES, Contribution, NoisySum, Query, Strategy
from fedsynth.core.randomness import OsKeyStream
from fedsynth.core.series import ONE, Turn
from fedsynth.server.planned import plan_of
from fedsynth.simulation.run import run_local
from fedsynth.strategies.independent import Columns
from fedsynth.strategies.parts.factorization import Decoder, prefix_noise, series_of
from scipy.linalg import toeplitz
from scipy.stats import chi2

NUM_ROUNDS, SEPARATION, DIM, USERS, CLIENTS = 10, 4, 6000, 40, 3
PASSES, FAILS = 1e-6, 1e-9
HEIGHT = 2.0**-10  # of each user's vector in each coordinate; whole steps of the grid
decoded: list[NoisySum] = []
encoded: list[NoisySum] = []
counts = np.zeros(NUM_ROUNDS)


@dataclass(frozen=True)
class Level(Strategy):
    """Rounds of a series in which every user whose turn it is gives the same low vector."""

    name: ClassVar[str] = "level"
    correlation: str = "banded"

    @property
    def series(self) -> Any:
        return series_of(self.correlation, num_rounds=NUM_ROUNDS, separation=SEPARATION)

    def event(self, schema: Any, noise_multiplier: float) -> Any:
        return accounting.SeriesDpEvent(noise_multiplier, NUM_ROUNDS)

    def rounds(self, schema: Any, noise_multiplier: float, rng: Any) -> Any:
        decoder = Decoder(self.series.coefficients)
        for position in range(NUM_ROUNDS):
            encoded.append(
                (
                    yield Query(
                        "level",
                        DIM,
                        1.0,
                        noise_multiplier,
                        resolution=MOST_IN_SERIES,
                        turn=Turn(self.series, position),
                    )
                )
            )
            decoded.append(decoder.take(encoded[-1]))
        return Columns(schema, [np.full(size, 1 / size) for size in schema.shape])

    def answer(self, query: Query, shard: Any, rng: Any) -> Contribution:
        counts[query.turn.position] += shard.num_users
        return Contribution.rows(np.full((shard.num_users, DIM), HEIGHT))


@pytest.fixture(
    scope="module",
    params=[("banded", "central"), ("blt", "local")],
    ids=["banded-central", "blt-local"],
)
def noise(request, tmp_path_factory):
    """Noise of decoded rounds, `(NUM_ROUNDS, DIM)`, of a whole run; and the series."""
    (correlation, placement), tmp_path = request.param, tmp_path_factory.mktemp("town")
    for seen in (decoded, encoded):
        seen.clear()
    counts[:] = 0
    lines = ["who,color", *(f"u{user},red" for user in range(USERS))]
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    color = {"type": "category", "categories": ["red", "green"], "origin": "public: made up"}
    (tmp_path / "schema.json").write_text(json.dumps({"columns": {"color": color}}))
    described = {
        "population": {"name": "town", "num_users": USERS, "epsilon": 9.0, "delta": 1e-3},
        "data": {"path": "people.csv", "schema": "schema.json"},
        "unit": {"column": "who"},
        "budget": {"epsilon": 4.0},
        "noise": {"placement": placement},
        "strategy": {"name": f"{__name__}:Level", "correlation": correlation},
        "engine": {"clients": CLIENTS, "timeout_s": 20.0},
        "release": {"num_records": 10},
    }
    run_local(plan_of(parse_config(described, base=tmp_path)), stream=OsKeyStream())
    own = np.array([one.vector for one in decoded]) - HEIGHT * counts[:, None]
    return own, Level(correlation).series


def inverse_of(coefficients):
    column = np.zeros(NUM_ROUNDS)
    column[: len(coefficients)] = np.array(coefficients) / ONE
    return np.linalg.inv(np.tril(toeplitz(column)))


def likelihood(noise, covariance):
    """How well a Gaussian of this covariance fits independent columns: p of the ratio test."""
    found = noise @ noise.T / noise.shape[1]
    ratio = np.linalg.solve(covariance, found)
    statistic = noise.shape[1] * (np.trace(ratio) - np.linalg.slogdet(ratio)[1] - len(noise))
    return chi2(len(noise) * (len(noise) + 1) // 2).sf(statistic)


def test_decoded_noise_has_the_covariance_of_the_matrix_mechanism(noise):
    own, series = noise
    variance = encoded[0].stddev ** 2
    inverse = inverse_of(series.coefficients)
    expected = variance * inverse @ inverse.T

    assert likelihood(own, expected) > PASSES
    assert likelihood(own, np.diag(np.diag(expected))) < FAILS
    for factor in (2 / 3, 4 / 3):
        first, *others = series.coefficients
        wrong = inverse_of((first, *(factor * step for step in others)))
        assert likelihood(own, variance * wrong @ wrong.T) < FAILS
        assert likelihood(own, factor**2 * expected) < FAILS


def test_prefix_sums_carry_the_noise_that_is_foretold(noise):
    own, series = noise

    found = np.sqrt((np.cumsum(own, axis=0) ** 2).mean())

    expected = encoded[0].stddev * prefix_noise(series.coefficients, NUM_ROUNDS)
    assert found == pytest.approx(expected, rel=0.03)


def test_each_decoded_round_says_how_much_noise_it_has(noise):
    own, _ = noise

    told = [one.stddev for one in decoded]

    assert np.allclose(own.std(axis=1), told, rtol=0.06)
    assert told[1] > told[0] * 1.05


def test_encoded_noise_is_independent_from_round_to_round(noise):
    _, series = noise
    column = np.zeros(NUM_ROUNDS)
    column[: len(series.coefficients)] = np.array(series.coefficients) / ONE
    sums = np.tril(toeplitz(column)) @ (HEIGHT * counts)

    alone = np.array([one.vector for one in encoded]) - sums[:, None]

    variance = encoded[0].stddev ** 2
    assert likelihood(alone, variance * np.eye(NUM_ROUNDS)) > PASSES
    assert likelihood(alone, 16 / 9 * variance * np.eye(NUM_ROUNDS)) < FAILS
