# SPDX-License-Identifier: Apache-2.0
"""Tuning a language model by users' texts: how often it guesses what other users wrote.

Users of a technical chat room, and roles in Shakespeare's plays. SmolLM2-135M gets adapters of low
rank, which users train by one text a round each (`dp_lora`). Rows are `epsilon=inf` (exact sums),
10, 4, 1, and 0: the same model after the same prompt, with eight public examples in it, and no
adapter. All are judged on users who took no part:

- next-token accuracy of the tuned model itself, which the release holds; `p over users` is of a
  bootstrap over judges for these very models, `p over seeds` of a t-test over runs;
- accuracy of a small model that is trained on other public text and then on as many texts that the
  tuned model wrote as of any row, `real` ones of other users among them;
- words of a text, real and synthetic: private tuning is known to write short ones.

SmolLM2 has read much of the public web, most likely Shakespeare and chat logs among it: figures of
epsilon = 0 profit from that as much as all others, and none of them says what a model would do on
texts that were never public.

    python benchmarks/training_text.py --json FILE      two hours of one idle core
    python benchmarks/training_text.py --quick          a tiny random model: shows that it runs

Each run goes into FILE.runs.jsonl when it is done: a benchmark that was cut goes on where it was.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pe_text
import tables
from fedsynth.core import accounting
from fedsynth.core.errors import ConfigError
from fedsynth.core.privacy import Budget
from fedsynth.core.records import Records
from fedsynth.core.texts import as_texts
from fedsynth.models.small_model import fine_tune
from fedsynth.simulation.direct import direct_run, non_private
from fedsynth.strategies.dp_lora import DpLora
from fedsynth.strategies.parts.trainable import RecordShape
from fedsynth.strategies.parts.tuned_language import LanguageTexts
from numpy.typing import NDArray
from pe_text import ACCURACY, BRIEFS, LIFT, SCHEMA, Case, Known

LEVELS = {"inf": math.inf, "10": 10.0, "4": 4.0, "1": 1.0, "0": 0.0}
TAUGHT = "small model, %"


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
      users: Who train, at most.
      cohort: Of them in a round, in the mean.
      rounds: Of training.
      judges: Users who judge, with `records` texts each at most.
      records: Texts of a user, at most.
      trained: Texts that a small model learns from.
      public: Other texts that it has learned from before.
      seeds: Repetitions.
    """

    users: int
    cohort: int
    rounds: int
    judges: int
    records: int
    trained: int
    public: int
    seeds: int


SIZES = {
    "quick": Size(60, 30, 2, 20, 2, 60, 100, 2),
    "full": Size(6000, 800, 4, 300, 4, 300, 4000, 5),
}


def main() -> int:
    """Measure all."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, help="repetitions")
    options.add_argument("--data", help="only this data set")
    options.add_argument("--level", action="append", help="only this epsilon and 0")
    args = options.parse_args()
    name = "quick" if args.quick else "full"
    size = replace(SIZES[name], seeds=args.seeds or SIZES[name].seeds)
    levels = [level for level in LEVELS if args.level is None or level in (*args.level, "0")]
    rows = ["real", *(f"epsilon={level}" for level in levels)]
    figures = report.Report("training_text", args)
    with pe_text.kept(args.json, name) as (known, folder), tempfile.TemporaryDirectory() as scratch:
        path = str(_tiny(Path(scratch))) if args.quick else ""
        cases = [c for c in _cases(figures, size, args.quick) if args.data in (None, c.name)]
        for case in cases:
            for seed in range(size.seeds):
                for row in rows:
                    _measure(case, size, known, folder, row, seed, path)
        found = {case.name: _told(figures, case, size, known, rows) for case in cases}
        if not args.quick:
            _claims(figures, found)
            figures.note("SmolLM2 has most likely read such texts before: see the docstring")
    return figures.finish(by_case=True)


def _cases(figures: report.Report, size: Size, quick: bool) -> Iterator[Case]:
    """Chatters and roles; quick: the example's roles."""
    cut = pe_text.Size(
        size.users, size.judges, size.records, 1, 1, 1, size.trained, size.public, size.seeds
    )
    if quick:
        speeches, held_out = pe_text.parquet("speeches"), pe_text.parquet("holdout")
        yield pe_text.case_of("shakespeare", speeches, pe_text.flat(held_out), cut)
        return
    texts: dict[str, dict[str, list[str]]] = {}
    for name, file, fewest in (
        ("irc", "irc_users.jsonl.gz", 5),
        ("shakespeare", "shakespeare_roles.jsonl.gz", 1),
    ):
        path = tables.folder().parent / "text" / file
        if not path.exists():
            figures.note(f"{file} is not at hand: nothing of {name}")
            return
        by_user = pe_text.read(path)
        texts[name] = {user: own for user, own in by_user.items() if len(own) >= fewest}
    for name, other in (("irc", "shakespeare"), ("shakespeare", "irc")):
        yield pe_text.case_of(name, texts[name], pe_text.flat(texts[other]), cut)


# --- runs


def _strategy(case: Case, size: Size, path: str) -> DpLora:
    """How users train, the same at every epsilon."""
    num_users, brief = case.voters.num_users, BRIEFS[case.name]
    place = {"first_layer": 1, "num_layers": 1, "rank": 2} if path else {}
    return DpLora(
        num_users=num_users,
        num_rounds=size.rounds,
        sampling_prob=min(1.0, size.cohort / num_users),
        clip=0.5,
        local_lr=1.0,
        local_batch=1,
        server_optimizer="fedavgm",
        server_lr=10.0,
        momentum=0.0,
        about=brief["about"],
        examples=brief["examples"],
        max_tokens=48,
        path=path,
        **place,
    )


def _learned(case: Case, size: Size, row: str, seed: int, path: str) -> LanguageTexts:
    """What a run at a level releases."""
    strategy, epsilon = _strategy(case, size, path), LEVELS[row.partition("=")[2]]
    rng = np.random.default_rng([seed, 7])
    if not epsilon:
        model = strategy.model_for(RecordShape.of(SCHEMA))
        learned: Any = model.synthesizer(SCHEMA, model.initial(rng))
    elif math.isinf(epsilon):
        learned = non_private(strategy, SCHEMA, case.voters, rng)
    else:
        budget = Budget(epsilon, case.delta)
        dial = accounting.calibrate(lambda z: strategy.event(SCHEMA, z), budget)
        learned = direct_run(strategy, SCHEMA, case.voters, dial, rng=rng)
    if not isinstance(learned, LanguageTexts):
        raise SystemExit("dp_lora gave something else than texts")
    return learned


def _measure(
    case: Case, size: Size, known: Known, folder: Path, row: str, seed: int, path: str
) -> None:
    """One run and its judges, if it is not known."""
    if known.of(case.name, row, seed) is not None:
        return
    found: dict[str, Any] = {}
    with report.cpu_timer() as spent:
        if row == "real":
            order = np.random.default_rng([seed, 9]).permutation(len(case.others))
            texts = [case.others[i] for i in order[: size.trained]]
        else:
            learned = _learned(case, size, row, seed, path)
            guesses = _guesses(case, learned)
            found = {
                "guesses": guesses[:, :2].astype(int).tolist(),
                "accuracy": float(guesses[:, 0].sum() / guesses[:, 1].sum()),
                "surprise": float(guesses[:, 2].sum() / guesses[:, 1].sum()),
            }
            drawn = learned.sample(size.trained, np.random.default_rng([seed, 8])).texts
            texts = [] if drawn is None else [str(text) for text in drawn]
    base = pe_text.base_of(case, folder)
    small = fine_tune(texts, base, seed=seed, learning_rate=pe_text.step_of(base.shape))
    taught = pe_text.accuracy_of(small, case)
    words = float(np.mean([len(text.split()) for text in texts]))
    found = {"accuracy": taught["accuracy"]} | found
    known.add(found | {"taught": taught, "words": words, "CPU-s": spent[0]}, case.name, row, seed)


def _guesses(case: Case, learned: LanguageTexts) -> NDArray[np.float64]:
    """Right guesses, tokens and surprise of each judge."""
    texts = as_texts(case.judges)
    found = np.zeros((int(case.judge_of.max()) + 1, 3))
    each = learned.guesses(Records(np.zeros((len(texts), 0), dtype=np.int32), texts=texts))
    np.add.at(found, case.judge_of, each)
    return found


def _tiny(folder: Path) -> Path:
    """A causal model of random weights with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=fast.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# --- figures


def _told(
    figures: report.Report, case: Case, size: Size, known: Known, rows: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Put the rows of one data set into the table; its runs by row, one a seed."""
    found = {
        row: [known.of(case.name, row, seed) or {} for seed in range(size.seeds)] for row in rows
    }
    zero = found["epsilon=0"]
    wrote = [run["taught"] for run in zero]
    for row in rows:
        name, runs = f"{case.name} {row}", found[row]
        if row != "real":
            figures.add(name, f"{ACCURACY}, %", [100 * r["accuracy"] for r in runs], unit="%")
            figures.add(name, "nats a token", [r["surprise"] for r in runs], unit="")
        if row not in ("real", "epsilon=0"):
            lifts = pe_text.apart(runs, zero, "accuracy")
            figures.add(name, f"{LIFT}, points", [100 * lift for lift in lifts], unit="")
            figures.add(name, "p over users", pe_text.p_users(runs, zero), unit="")
            figures.add(name, "p over seeds", pe_text.p_seeds(lifts), unit="")
        taught = [run["taught"] for run in runs]
        figures.add(name, TAUGHT, [100 * run["accuracy"] for run in taught], unit="%")
        if row != "epsilon=0":
            lifts = pe_text.apart(taught, wrote, "accuracy")
            figures.add(name, f"its {LIFT}, points", [100 * lift for lift in lifts], unit="")
            figures.add(name, "its p over seeds", pe_text.p_seeds(lifts), unit="")
        figures.add(name, "words a text", [run["words"] for run in runs], unit="words")
        figures.add(name, "CPU-s", [run["CPU-s"] for run in runs], unit="CPU-s")
    return found


def _claims(figures: report.Report, found: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Users must make the model better at other users' texts than it was without them."""
    for name, rows in found.items():
        for row, runs in rows.items():
            if row in ("real", "epsilon=0") or (name, row) == ("shakespeare", "epsilon=1"):
                continue
            lifts = pe_text.apart(runs, rows["epsilon=0"], "accuracy")
            over_users = pe_text.p_users(runs, rows["epsilon=0"])
            over_seeds = pe_text.p_seeds(lifts)
            mean = 100 * float(np.mean(lifts))
            figures.claim(
                f"{name} {row}: next-token accuracy {mean:+.2g} points over epsilon = 0,"
                f" p = {over_users:.2g} over users and {over_seeds:.2g} over seeds",
                mean > 0 and over_users < 0.05 and (over_seeds < 0.05 or len(lifts) == 1),
            )


if __name__ == "__main__":
    try:
        code = main()
    except ConfigError as error:
        print(f"skipped: {error}", file=sys.stderr)
        code = 0
    raise SystemExit(code)
