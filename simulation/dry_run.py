# SPDX-License-Identifier: Apache-2.0
"""Drive a method's public half with made-up sums, to learn what it will ask; reads no records."""

import json
import math
import time
from dataclasses import dataclass, replace

import numpy as np

from ..core import accounting
from ..core.answering import answered
from ..core.candidates import Candidates
from ..core.choice import score_sensitivity
from ..core.embedding import EMBEDDER
from ..core.generation import PLACES, Generation
from ..core.leaf import Leaf, num_rounds_of
from ..core.privacy import NoisePlacement
from ..core.query import NoisySum, Query
from ..core.texts import as_texts
from ..core.wire import echoes, told
from ..models.registry import build_embedder
from ..server.planned import Plan

_DRY_RUN_S = 5.0  # a method's public half is driven this long at most; later rounds are assumed
_ARRAYS = ("grid_columns", "grid_starts", "grid_sizes", "grid_groups", "members", "heights")


@dataclass(frozen=True)
class Question:
    """A query without its arrays, and how large those were."""

    query: Query
    num_bytes: int


def questions_of(plan: Plan) -> list[Question]:
    """The questions of a run, as its public half asks them of users who are spread evenly.

    A method asks by what it has found, so a run may ask other tables, and larger ones. What it
    costs is fixed beforehand. Past the time limit, rounds are taken to be like the last one seen
    but for their cost.
    """
    planned = accounting.leaves(plan.event)
    steps = plan.strategy.rounds(plan.schema, plan.noise_multiplier, plan.rng)
    rounds = answered(steps, stand_in)
    deadline = time.monotonic() + _DRY_RUN_S
    questions: list[Question] = []
    asked: dict[Leaf, list[Question]] = {leaf: [] for leaf in planned}
    try:
        query = next(rounds)
        while True:
            told_arrays = [
                *query.inputs.values(),
                *told(query.choice).values(),
                *echoes(query.turn).values(),
            ]
            num_bytes = sum(array.nbytes for array in told_arrays)
            questions.append(Question(replace(query, inputs={}), num_bytes))
            asked[query.leaf].append(questions[-1])
            if len(questions) == num_rounds_of(planned) or time.monotonic() > deadline:
                break
            query = rounds.send(made_up(plan, query))
    except StopIteration:
        return questions
    rounds.close()
    last = questions[-1]
    for leaf, count in sorted(planned.items()):
        unseen = asked[leaf][-1] if asked[leaf] else replace(last, query=_priced(last.query, leaf))
        questions += [unseen] * max(0, count * leaf.rounds - len(asked[leaf]))
    return questions


def _priced(query: Query, leaf: Leaf) -> Query:
    """A query that costs what `leaf` says, and is like another otherwise."""
    return replace(
        query,
        noise_multiplier=leaf.noise_multiplier,
        sampling_prob=leaf.sampling_prob,
        records=leaf.records if leaf.records > 1 else 0,
        turn=None,
    )


def stand_in(request: Generation) -> Candidates:
    """Candidates of the right shapes, which no model made: a dry run asks none."""
    schema, num = request.subject.schema, len(request.candidates)
    images = None if schema.image is None else np.zeros((num, *schema.image.shape), dtype=np.uint8)
    texts = None if schema.text is None else as_texts([""] * num)
    extras = {}
    if request.embedder:
        embedder = build_embedder(request.embedder, json.loads(request.embedder_settings))
        extras[PLACES] = np.zeros((num, embedder.dim), dtype=np.int16)
        extras[EMBEDDER] = np.zeros((num, 32), dtype=np.uint8)
    return replace(request.candidates, images=images, texts=texts, extras=extras)


def stddev_of(plan: Plan, query: Query) -> float:
    """Noise of a sum in which every client has its part."""
    max_clients = plan.config.unit.max_clients
    if query.choice is not None:
        return query.noise_multiplier * score_sensitivity(query) * max_clients
    local = plan.config.noise.placement is NoisePlacement.LOCAL
    over = math.sqrt(plan.config.engine.clients) if local else 1.0
    return query.noise_multiplier * query.clip * max_clients * over


def made_up(plan: Plan, query: Query) -> NoisySum:
    """The sum of the declared users, each of one record drawn evenly; void if not of histograms."""
    if query.choice is not None or not query.inputs.keys() >= {*_ARRAYS}:
        return NoisySum.void(query)
    _, starts, sizes, groups, members, heights = (query.inputs[name] for name in _ARRAYS)
    shares = [
        np.bincount(groups[first:end], minlength=size) / (end - first)
        for first, end, size in zip(starts[:-1], starts[1:], sizes, strict=True)
    ]
    users = plan.config.population.num_users * query.sampling_prob
    counts = []
    for member, height in zip(members, heights, strict=True):
        joint = np.array([users * height])
        for grid in member[member >= 0]:
            joint = np.outer(joint, shares[grid]).ravel()
        counts.append(joint)
    vector = np.concatenate(counts)
    if len(vector) != query.dim:  # there is more in it than histograms
        return NoisySum.void(query)
    return NoisySum(vector, stddev_of(plan, query), plan.config.engine.clients)
