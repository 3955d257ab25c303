# SPDX-License-Identifier: Apache-2.0
"""Tuning a language model by users' texts: how often it guesses what other users wrote.

Users of a technical chat room, and roles in Shakespeare's plays. SmolLM2-135M gets adapters of low
rank, which users train by one text a round each (`dp_lora` as it is by default). Rows are
`epsilon=inf` (exact sums), 4, 1, and 0: the same model after the same prompt, with eight public
examples in it, and no adapter. All are judged on users who took no part, by the next-token accuracy
of the tuned model itself, which the release holds. `p over users` is of a bootstrap over judges for
these very models; `p over seeds` of a t-test over runs, which differ in noise and in which text a
user takes in which round.

Settings were chosen with users who neither train nor judge here (those of the rows `real`), with
other noise. With `--texts` a second judge: the accuracy of a small model that is trained on other
public text and then on as many texts that the tuned model wrote as of any row, `real` ones of other
users among them; and words of a text, real and synthetic: private tuning is known to write short
ones.

SmolLM2 has read much of the public web, most likely Shakespeare and chat logs among it: figures of
epsilon = 0 profit from that as much as all others, and none of them says what a model would do on
texts that were never public.

    python benchmarks/training_text.py --json FILE      an hour of one core
    python benchmarks/training_text.py --quick          a tiny random model: shows that it runs

Each run goes into FILE.full.runs.jsonl when it is done: a benchmark that was cut goes on where it
was.
"""

import report  # isort: skip  (first: it holds numpy and torch to one thread)

import math
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pe_text
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

LEVELS = {"0": 0.0, "1": 1.0, "4": 4.0, "inf": math.inf}
TAUGHT = "small model, %"


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
      users: Who train, at most.
      judges: Users who judge, with `records` texts each at most.
      records: Texts of a user, at most.
      trained: Texts that a small model learns from.
      public: Other texts that it has learned from before.
      seeds: Repetitions.
    """

    users: int
    judges: int
    records: int
    trained: int
    public: int
    seeds: int

    @property
    def cut(self) -> pe_text.Size:
        """As the benchmark of votes cuts the same data."""
        no_votes = {"rounds": 1, "candidates": 1, "expanded": 1}
        return pe_text.Size(**asdict(self), **no_votes)


SIZES = {
    "quick": Size(60, 20, 2, 60, 100, 2),
    "full": Size(3000, 300, 4, 300, 4000, 5),
}


def main() -> int:
    """Measure all."""
    options = report.parser(__doc__)
    options.add_argument("--seeds", type=int, help="repetitions")
    options.add_argument("--data", help="only this data set")
    options.add_argument("--level", action="append", help="only this epsilon and 0")
    options.add_argument("--texts", action="store_true", help="judge sampled texts, too")
    args = options.parse_args()
    name = "quick" if args.quick else "full"
    size = replace(SIZES[name], seeds=args.seeds or SIZES[name].seeds)
    levels = [level for level in LEVELS if args.level is None or level in (*args.level, "0")]
    rows = [*(["real"] if args.texts else []), *(f"epsilon={level}" for level in levels)]
    figures = report.Report("training_text", args)
    kept_as = f"{name}.texts" if args.texts else name
    with (
        pe_text.kept(args.json, kept_as) as (known, folder),
        tempfile.TemporaryDirectory() as scratch,
    ):
        path = str(_tiny(Path(scratch))) if args.quick else ""
        cases = [
            case
            for case in pe_text.cases_of(figures, size.cut, quick=args.quick)
            if args.data in (None, case.name)
        ]
        texts = folder if args.texts else None
        for seed in range(size.seeds):
            for case in cases:
                for row in rows:
                    own = _seed_of(row, seed, args.texts)
                    _measure(case, size, known, texts, row, own, path)
        found = {}
        for case in cases:
            seeds = range(size.seeds)
            runs = {
                row: [known.of(case.name, row, _seed_of(row, s, args.texts)) or {} for s in seeds]
                for row in rows
            }
            found[case.name] = _told(figures, case.name, runs)
        if not args.quick:
            _claims(figures, found)
            figures.note("SmolLM2 has most likely read such texts before: see the docstring")
    return figures.finish(by_case=True)


# --- runs


def _seed_of(row: str, seed: int, texts: bool) -> int:
    """The seed that a row is measured with: the public model guesses the same in all of them."""
    return 0 if row == "epsilon=0" and not texts else seed


def _strategy(case: Case, path: str) -> DpLora:
    """How users train: as the strategy has it, the same at every epsilon."""
    brief = BRIEFS[case.name]
    place = {"first_layer": 1, "num_layers": 1} if path else {}
    return DpLora(
        num_users=case.voters.num_users,
        about=brief["about"],
        examples=brief["examples"],
        path=path,
        **place,
    )


def _learned(case: Case, row: str, seed: int, path: str) -> LanguageTexts:
    """What a run at a level releases."""
    strategy, epsilon = _strategy(case, path), LEVELS[row.partition("=")[2]]
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
    case: Case, size: Size, known: Known, folder: Path | None, row: str, seed: int, path: str
) -> None:
    """One run and its judges, if it is not known; with a folder, also by texts."""
    if known.of(case.name, row, seed) is not None:
        return
    found: dict[str, Any] = {}
    with report.cpu_timer() as spent:
        learned = None
        if row != "real":
            learned = _learned(case, row, seed, path)
            guesses = _guesses(case, learned)
            found = {
                "guesses": guesses[:, :2].astype(int).tolist(),
                "accuracy": float(guesses[:, 0].sum() / guesses[:, 1].sum()),
                "surprise": float(guesses[:, 2].sum() / guesses[:, 1].sum()),
            }
    if folder is not None:
        found = _of_texts(case, size, folder, learned, seed) | found
    known.add(found | {"CPU-s": spent[0]}, case.name, row, seed)


def _of_texts(
    case: Case, size: Size, folder: Path, learned: LanguageTexts | None, seed: int
) -> dict[str, Any]:
    """What a small model learns from sampled texts; `None`: from those of other users."""
    if learned is None:
        order = np.random.default_rng([seed, 9]).permutation(len(case.others))
        texts = [case.others[i] for i in order[: size.trained]]
    else:
        drawn = learned.sample(size.trained, np.random.default_rng([seed, 8])).texts
        texts = [] if drawn is None else [str(text) for text in drawn]
    base = pe_text.base_of(case, folder)
    small = fine_tune(texts, base, seed=seed, learning_rate=pe_text.step_of(base.shape))
    taught = pe_text.accuracy_of(small, case)
    words = float(np.mean([len(text.split()) for text in texts]))
    return {"accuracy": taught["accuracy"], "taught": taught, "words": words}


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
    figures: report.Report, data: str, found: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """Put the rows of one data set into the table; `found` are its runs by row, one a seed."""
    zero = found["epsilon=0"]
    for row, runs in found.items():
        name = f"{data} {row}"
        if row != "real":
            figures.add(name, f"{ACCURACY}, %", [100 * r["accuracy"] for r in runs], unit="%")
            figures.add(name, "nats a token", [r["surprise"] for r in runs], unit="")
        if row not in ("real", "epsilon=0"):
            lifts = pe_text.apart(runs, zero, "accuracy")
            figures.add(name, f"{LIFT}, points", [100 * lift for lift in lifts], unit="")
            figures.add(name, "p over users", pe_text.p_users(runs, zero), unit="")
            figures.add(name, "p over seeds", pe_text.p_seeds(lifts), unit="")
        if "taught" in runs[0]:
            taught = [run["taught"] for run in runs]
            figures.add(name, TAUGHT, [100 * run["accuracy"] for run in taught], unit="%")
            if row != "epsilon=0":
                lifts = pe_text.apart(taught, [run["taught"] for run in zero], "accuracy")
                figures.add(name, f"its {LIFT}, points", [100 * lift for lift in lifts], unit="")
                figures.add(name, "its p over seeds", pe_text.p_seeds(lifts), unit="")
            figures.add(name, "words a text", [run["words"] for run in runs], unit="words")
        figures.add(name, "CPU-s", [run["CPU-s"] for run in runs], unit="CPU-s")
    return found


def _claims(figures: report.Report, found: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Users must make the model better at other users' texts than it was without them."""
    for name, rows in found.items():
        for row, runs in rows.items():
            if row in ("real", "epsilon=0"):
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
