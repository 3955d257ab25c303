# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of federated text concludes from its figures."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def pe_text(benchmark_of):
    return benchmark_of("pe_text")


def run(right, seed=0, num_judges=200, tokens=60):
    """Guesses of judges who differ far more from each other than two rows do."""
    rng = np.random.default_rng(seed)
    ease = np.random.default_rng(1).beta(2, 10, num_judges)
    guesses = np.stack([rng.binomial(tokens, ease * right), np.full(num_judges, tokens)], axis=1)
    return {"accuracy": guesses[:, 0].sum() / guesses[:, 1].sum(), "guesses": guesses.tolist()}


def test_a_lift_is_found_where_judges_are_paired_and_chance_is_not_taken_for_one(pe_text):
    zero, same, better = ([run(f, s) for s in seeds] for f, seeds in
                          ((1.0, (0, 1, 2)), (1.0, (3, 4, 5)), (1.1, (6, 7, 8))))  # fmt: skip

    low, high = pe_text._interval(zero)

    assert pe_text.p_users(same, zero) > 0.05
    assert pe_text.p_users(better, zero) < 0.01
    assert min(pe_text.apart(better, zero, "accuracy")) > 0
    assert low < np.mean([r["accuracy"] for r in zero]) < high


def test_an_interval_over_judges_is_as_wide_as_their_spread_calls_for(pe_text):
    zero = run(1.0)
    each = np.array(zero["guesses"])[:, 0] / 60

    low, high = pe_text._interval([zero])

    expected = 2 * 1.96 * each.std() / len(each) ** 0.5
    assert high - low == pytest.approx(expected, rel=0.1)


def test_no_user_votes_and_judges_and_the_budget_is_priced_below_one_in_all_users(pe_text):
    texts = {f"u{i}": [f"text {i} of it", f"other {i}"] for i in range(500)}
    size = pe_text.SIZES["two-minutes"]

    case = pe_text.case_of("irc", texts, ["public"], size)

    voters = {text.split()[1] for text in case.voters.records.texts}
    judges = {text.split()[1] for text in case.judges}
    others = {text.split()[1] for text in case.others}
    assert not voters & judges
    assert not others & (voters | judges)
    assert case.voters.num_users == size.users == len(voters)
    assert len(judges) == size.judges
    assert case.delta < 1 / case.voters.num_users


def test_rows_that_were_measured_are_known_again_even_where_a_line_was_cut(pe_text, tmp_path):
    path = tmp_path / "x.json"
    with pe_text.kept(path, "quick") as (known, _):
        known.add({"accuracy": 0.1}, "irc", "real", 0)
    with path.with_suffix(".quick.runs.jsonl").open("a") as file:
        file.write('{"row": "irc epsi')

    with pe_text.kept(path, "quick") as (known, folder):
        assert known.of("irc", "real", 0) == {"accuracy": 0.1}
        assert known.of("irc", "real", 1) is None
        assert folder.is_dir()


def test_a_lift_over_seeds_is_told_from_chance(pe_text):
    # t = mean / (std / sqrt(n)) = 2 / (1 / sqrt(3)) = 3.46 of two degrees of freedom: p = 0.074
    assert pe_text.p_seeds([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)
    assert pe_text.p_seeds([-1.0, 0.5, 0.4, 0.0]) > 0.5
    assert pe_text.p_seeds([0.3]) == 1.0
