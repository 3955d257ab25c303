# SPDX-License-Identifier: Apache-2.0
"""Keep where a strategy's public half stands, so that a resumed run goes on from there.

One file in the run's working folder, replaced whole. It is a shortcut and never the truth: it
names the version, the run, its facts and the ledger's entry that ended its last round; if any of
that is another, or there is no such file, all sums are replayed, to the same end.
"""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..core.answering import Source, answered
from ..core.checkpoint import Checkpoint, State
from ..core.errors import SecurityRefusal
from ..core.files import write_whole
from ..core.query import Rounds
from ..core.wire import canonical
from .ledger import Ledger
from .planned import Plan
from .transcript import tensors_in

CHECKPOINT = "checkpoint.safetensors"
EVERY_S = 20.0
"""A checkpoint is kept at most so often: replay takes no longer to do again."""

_FACTS = "facts"
_log = logging.getLogger(__name__)


class Checkpoints:
    """A run's checkpoints.

    Args:
      folder: The run's working folder.
      plan: The run.
      ledger: Where it is committed.
    """

    def __init__(self, folder: Path, plan: Plan, ledger: Ledger) -> None:
        self._path, self._plan, self._ledger = folder / CHECKPOINT, plan, ledger
        self._rng = plan.rng
        self._done, self._kept_at = 0, time.monotonic()

    def rounds(self, source: Source) -> tuple[Rounds, int]:
        """The strategy's rounds from the newest checkpoint on, and how many came before it.

        Args:
          source: What answers generations.
        """
        plan, strategy = self._plan, self._plan.strategy
        goes_on = getattr(strategy, "rounds_from", None)
        if goes_on is None:
            steps = strategy.rounds(plan.schema, plan.noise_multiplier, self._rng)
        else:
            state = self._newest()
            steps = goes_on(plan.schema, plan.noise_multiplier, self._rng, state)
        return answered(steps, source, self._keep), self._done

    def _keep(self, checkpoint: Checkpoint, rounds: int) -> None:
        """Store a checkpoint, unless one was stored just now: whole or not at all."""
        if time.monotonic() < self._kept_at + EVERY_S:
            return
        facts = json.dumps(self._facts(self._done + rounds) | {"rng": _state_of(self._rng)})
        tensors = {name: np.array(array, order="C") for name, array in checkpoint.state().items()}
        try:
            write_whole(self._path, _packed(tensors, facts))
        except OSError as error:
            _log.warning("no checkpoint could be kept: %s; the run goes on", error.strerror)
        self._kept_at = time.monotonic()

    def _newest(self) -> State | None:
        """The state of the checkpoint that is kept, if it is this run's; sets the rng by it."""
        if not self._path.exists():
            return None
        try:
            tensors = tensors_in(CHECKPOINT, self._path.read_bytes())
            facts = json.loads(tensors.pop(_FACTS).tobytes())
            rng = _rng_of(facts.pop("rng"))
            is_ours = bool(facts["entry"]) and facts == self._facts(int(facts["rounds"]))
        except (SecurityRefusal, ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s cannot be read (%s); all sums are replayed", self._path, error)
            return None
        if not is_ours:
            _log.warning("%s is another run's; all sums are replayed", self._path)
            return None
        self._rng, self._done = rng, int(facts["rounds"])
        return tensors

    def _facts(self, rounds: int) -> dict[str, Any]:
        """What a checkpoint after so many rounds must say."""
        last = [e for e in self._ledger.entries(self._plan.run) if e.round == rounds]
        ended = bool(last) and last[-1].kind in ("release", "void")
        return {
            "fedsynth": __version__,
            "run": self._plan.run,
            "committed": hashlib.sha256(canonical(self._plan.facts).encode()).hexdigest(),
            "rounds": rounds,
            "entry": last[-1].hash if ended else "",
        }


def _packed(tensors: State, facts: str) -> bytes:
    """A checkpoint as it is stored."""
    from safetensors.numpy import save

    return bytes(save({**tensors, _FACTS: np.frombuffer(facts.encode(), dtype=np.uint8)}))


def _state_of(rng: np.random.Generator) -> dict[str, Any]:
    """A generator's state as plain data, with that of the streams that are spawned from it."""
    seeds: Any = rng.bit_generator.seed_seq
    return {
        "entropy": seeds.entropy,
        "spawn_key": list(seeds.spawn_key),
        "spawned": seeds.n_children_spawned,
        "state": rng.bit_generator.state,
    }


def _rng_of(data: dict[str, Any]) -> np.random.Generator:
    """The generator that plain data describes."""
    seeds = np.random.SeedSequence(
        data["entropy"],
        spawn_key=tuple(data["spawn_key"]),
        n_children_spawned=data["spawned"],
    )
    rng = np.random.Generator(np.random.PCG64(seeds))
    rng.bit_generator.state = data["state"]
    return rng
