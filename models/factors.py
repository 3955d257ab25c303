# SPDX-License-Identifier: Apache-2.0
"""What of an adapter is never trained, made of the public model at its prompt alone.

An adapter adds `C B A x` beside a weight. How far a step in B moves the model's guesses should not
hang on which of B's numbers it moves: noise is the same in all of them, and so is a clip.

- A: its first row makes of the part's input a number that is alike for all tokens, so that the
  first column of B shifts the output; further rows are random. Their numbers' mean square is 1.
- C, where a part writes to the stream that the output is read from (`o_proj`, `down_proj`): the
  damped inverse root of the Fisher information of the next token in that stream. A step of length s
  in B then changes what the model guesses by about s^2 / 2 nats, in whatever direction. Elsewhere
  there is none.

Reference:
  Amari (1998), "Natural Gradient Works Efficiently in Learning", Neural Computation 10(2); adapters
  with fixed factors on both sides: Bałazy et al. (2024), "LoRA-XS", arXiv 2405.17604.
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from .lora import Frozen
from .one_core import one_core

_NEEDED_BY = "a language model that users tune"
_WRITES = ("o_proj", "down_proj")
_SEED = 5  # of rows that are random
_RIDGE = 20.0  # of the row that shifts, in tokens
_DAMPING = 0.1  # of the information's mean eigenvalue


@lru_cache(maxsize=64)
def factors_of(model: Frozen, prompt: str, name: str, rank: int) -> tuple[Any, Any]:
    """A, `(rank, inputs)`, and C, `(outputs, outputs)` or `None`, of the adapter `layer.part`."""
    with one_core(_NEEDED_BY, learns=True) as torch, torch.inference_mode(False), torch.no_grad():
        heard, states = model.heard(prompt, name)
        after = len(heard) // 20  # the first tokens of a text are unlike all others
        heard, states = heard[after:].float(), states[after:]
        moments = heard.T @ heard
        moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
        rows = [torch.linalg.solve(moments, heard.sum(0))]
        if rank > 1:
            seed = [_SEED, *hashlib.sha256(name.encode()).digest()[:8]]
            drawn = np.random.default_rng(seed).standard_normal((rank - 1, heard.shape[1]))
            rows += list(torch.from_numpy(drawn.astype(np.float32)))
        first = torch.stack(rows)
        first = (first / (heard @ first.T).pow(2).mean(0).sqrt()[:, None]).bfloat16()
        if name.partition(".")[2] not in _WRITES:
            return first, None
        values, vectors = torch.linalg.eigh(model.information(states).double())
        damped = values.clamp_min(0) + _DAMPING * values.mean()
        return first, ((vectors * damped.rsqrt()) @ vectors.T).bfloat16()
