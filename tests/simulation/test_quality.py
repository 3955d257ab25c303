# SPDX-License-Identifier: Apache-2.0
"""Quality figures, on tables small enough to work out by hand."""

import math

import numpy as np
import pytest
from fedsynth.core.errors import DataError, SchemaError
from fedsynth.core.records import Records
from fedsynth.core.schema import Column, ImageColumn, Schema
from fedsynth.simulation.quality import (
    Accuracy,
    Quality,
    column_variation,
    quality_of,
    quality_table,
    total_variation,
    train_on_synthetic,
)


def category(name: str, num_cells: int) -> Column:
    return Column(name, "category", "public: test", tuple(str(i) for i in range(num_cells)))


def coded(*rows: tuple[int, ...]) -> Records:
    return Records(np.array(rows, dtype=np.int32))


TWO_BITS = Schema((category("a", 2), category("b", 2)))


def test_total_variation_of_equal_records_is_zero():
    records = coded((0, 1), (1, 0), (1, 1))

    assert total_variation(records, records, TWO_BITS, 2) == 0.0


def test_total_variation_of_disjoint_records_is_one():
    assert total_variation(coded((0, 0)), coded((1, 1)), TWO_BITS, 2) == 1.0


def test_total_variation_averages_over_the_marginals():
    real = coded((0, 0), (0, 0), (0, 1), (1, 1))  # a: 3/4 1/4, b: 1/2 1/2
    synthetic = coded((0, 0), (1, 1))  # a: 1/2 1/2, b: 1/2 1/2

    # column a differs by 1/4, column b by 0; cells 00 01 11: (1/2 1/4 1/4) against (1/2 0 1/2)
    assert total_variation(real, synthetic, TWO_BITS, 1) == pytest.approx(0.125)
    assert total_variation(real, synthetic, TWO_BITS, 2) == pytest.approx(0.25)


def test_total_variation_sees_a_dependence_that_one_way_marginals_miss():
    real = coded((0, 0), (1, 1))
    independent = coded((0, 0), (0, 1), (1, 0), (1, 1))

    assert total_variation(real, independent, TWO_BITS, 1) == 0.0
    assert total_variation(real, independent, TWO_BITS, 2) == pytest.approx(0.5)


def test_huge_marginals_are_counted_by_occupied_cells_only():
    schema = Schema((category("a", 1 << 12), category("b", 1 << 12)))  # 2^24 cells together
    real = coded((0, 0), (4095, 4095), (17, 3), (17, 3))
    synthetic = coded((0, 0), (17, 3))

    # cells (0,0) (4095,4095) (17,3): (1/4 1/4 1/2) against (1/2 0 1/2)
    assert total_variation(real, synthetic, schema, 2) == pytest.approx(0.25)


def test_a_choice_of_marginals_is_the_same_every_time():
    schema = Schema(tuple(category(f"c{i}", 2) for i in range(8)))
    rng = np.random.default_rng(3)
    real = Records(rng.integers(0, 2, (200, 8)).astype(np.int32))
    synthetic = Records((rng.random((200, 8)) < np.linspace(0.1, 0.9, 8)).astype(np.int32))

    some = total_variation(real, synthetic, schema, 3, max_marginals=10)
    every = total_variation(real, synthetic, schema, 3)

    assert some == total_variation(real, synthetic, schema, 3, max_marginals=10)
    assert some != every
    assert some == pytest.approx(every, rel=0.2)
    assert total_variation(real, synthetic, schema, 3, max_marginals=56) == every


@pytest.mark.parametrize("order", [0, 3])
def test_an_order_that_the_schema_cannot_have_is_refused(order: int):
    with pytest.raises(DataError, match="order must be 1 to 2"):
        total_variation(coded((0, 0)), coded((0, 0)), TWO_BITS, order)


def test_nothing_to_compare_is_refused():
    nothing = Records(np.zeros((0, 2), dtype=np.int32))

    with pytest.raises(DataError, match="at least one"):
        total_variation(coded((0, 0)), nothing, TWO_BITS, 1)


def noisy_copies(num_records: int, agree: float, seed: int) -> Records:
    """Column b repeats column a in a share `agree` of the records."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2, num_records)
    b = np.where(rng.random(num_records) < agree, a, 1 - a)
    return Records(np.column_stack([a, b]).astype(np.int32))


def test_judges_score_what_the_synthetic_records_taught_them():
    real = noisy_copies(2000, 0.9, seed=1)

    kept = train_on_synthetic(real, noisy_copies(500, 0.9, seed=2), TWO_BITS, target="b")
    lost = train_on_synthetic(real, noisy_copies(500, 0.1, seed=3), TWO_BITS, target="b")

    share = float((real.codes[:, 0] == real.codes[:, 1]).mean())
    for judge in ("logistic", "boosting"):
        assert kept[judge].synthetic == pytest.approx(share)  # b = a is the best rule
        assert lost[judge].synthetic == pytest.approx(1 - share)  # b = not a was learnt
        assert math.isnan(kept[judge].real)


def test_judges_stand_beside_the_majority_class_and_real_training():
    test = coded((0, 0), (0, 0), (0, 0), (1, 1))

    scores = train_on_synthetic(
        test,
        coded((0, 0), (1, 0)),
        TWO_BITS,
        target="b",
        real_train=noisy_copies(500, 1.0, seed=4),
    )

    # the synthetic records hold one class only, so a judge can say nothing else
    assert scores["logistic"] == Accuracy(synthetic=0.75, real=1.0, majority=0.75)
    assert scores["boosting"] == Accuracy(synthetic=0.75, real=1.0, majority=0.75)


def test_judges_of_images_look_at_pixels():
    schema = Schema(
        (category("label", 2),), ImageColumn("image", (2, 2, 1), "public: test"), target="label"
    )
    rng = np.random.default_rng(5)

    def made(num_records: int) -> Records:
        labels = rng.integers(0, 2, num_records)
        images = rng.integers(0, 100, (num_records, 2, 2, 1)) + 150 * labels[:, None, None, None]
        return Records(labels[:, None].astype(np.int32), images.astype(np.uint8))

    scores = train_on_synthetic(made(100), made(200), schema, target="label")

    assert scores["logistic"].synthetic > 0.95
    assert scores["network"].synthetic > 0.95


def test_a_number_cannot_be_a_target():
    schema = Schema(
        (category("a", 2), Column("x", "real", "public: test", bounds=(0.0, 1.0), num_bins=2))
    )

    with pytest.raises(SchemaError, match="must be a category"):
        train_on_synthetic(coded((0, 0)), coded((0, 0)), schema, target="x")


def test_quality_holds_all_figures_and_its_table_names_them():
    schema = Schema(TWO_BITS.columns, target="b")
    real, test = noisy_copies(400, 0.9, seed=6), noisy_copies(400, 0.9, seed=7)

    quality = quality_of(real, real, schema, test=test)

    assert quality.total_variation == {1: 0.0, 2: 0.0}  # two columns have no 3-way marginal
    assert quality.accuracy["logistic"].synthetic == quality.accuracy["logistic"].real
    assert (quality.num_real, quality.num_synthetic) == (400, 400)
    measures = list(quality_table(quality).columns[0].cells)
    assert measures == [
        "1-way total variation",
        "2-way total variation",
        "logistic predicts b",
        "boosting predicts b",
    ]


def test_quality_without_a_target_has_no_accuracy():
    records = coded((0, 1), (1, 0))

    assert quality_of(records, records, TWO_BITS) == Quality({1: 0.0, 2: 0.0}, {}, None, 2, 2)


def test_columns_are_listed_from_the_worst_to_the_best():
    real = coded((0, 0), (0, 0), (0, 1), (1, 1))
    synthetic = coded((0, 0), (1, 1))

    # column a: (3/4 1/4) against (1/2 1/2); column b: (1/2 1/2) twice
    variation = column_variation(real, synthetic, TWO_BITS)

    assert list(variation.items()) == [("a", 0.25), ("b", 0.0)]
