# SPDX-License-Identifier: Apache-2.0
"""What of an adapter is not trained makes a step weigh alike in all directions."""

import importlib.util

import numpy as np
import pytest
from fedsynth.models.factors import factors_of
from fedsynth.models.lora import Frozen

for package in ("transformers", "torch"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)

PROMPT = "You write chats, and you answer with one such text and with nothing else. Write one."
NAME, STEP = "1.down_proj", 0.3


@pytest.fixture(scope="module")
def model(tiny_llama) -> Frozen:
    return Frozen(tiny_llama(initializer_range=0.2))


def moved(model: Frozen, direction: np.ndarray, *, with_metric: bool) -> float:
    """How far a step changes the guesses at the prompt's tokens, in nats a token."""
    import torch

    first, last = factors_of(model, PROMPT, NAME, 1)
    step = torch.from_numpy(direction.astype(np.float32))[:, None]
    heard, states = model.heard(PROMPT, NAME)
    added = (heard @ first.T) @ step.T.bfloat16()
    after = states + (added @ last.T if with_metric else added)
    old, new = (
        model._output(model._normed(torch, x, model._last)).float().log_softmax(-1)
        for x in (states, after)
    )
    return float((old.exp() * (old - new)).sum(-1).mean())


def test_a_step_weighs_about_half_its_square_in_every_direction(model):
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((12, 32))
    directions *= STEP / np.linalg.norm(directions, axis=1, keepdims=True)

    found = [moved(model, step, with_metric=True) for step in directions]
    plain = [moved(model, step, with_metric=False) for step in directions]

    assert 0.4 < np.mean(found) / (STEP**2 / 2) < 1.6
    assert max(found) / min(found) < 3
    assert not 0.4 < np.mean(plain) / (STEP**2 / 2) < 1.6


def test_the_first_row_makes_a_number_that_is_alike_for_all_tokens(model):
    first, _ = factors_of(model, PROMPT, NAME, 2)
    heard, _ = model.heard(PROMPT, NAME)

    shift, other = (heard @ first.T).float().numpy()[5:].T

    assert shift.mean() > 2 * shift.std()
    assert not abs(other.mean()) > 2 * other.std()


def test_factors_are_the_same_when_they_are_made_again(model):
    one = factors_of(model, PROMPT, NAME, 2)
    factors_of.cache_clear()
    two = factors_of(model, PROMPT, NAME, 2)

    assert all(bool((a == b).all()) for a, b in zip(one, two, strict=True))


def test_a_part_that_does_not_write_to_the_stream_has_no_metric(model):
    first, last = factors_of(model, PROMPT, "0.v_proj", 3)

    assert first.shape == (3, 32)
    assert last is None
