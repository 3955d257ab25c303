# SPDX-License-Identifier: Apache-2.0
"""Write docs/results.md from the JSON of full benchmark runs: python docs/record.py build/bench/*.json.

A section whose benchmark is in none of the files stays as it is.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEAD = """# Results

Figures of the last full run of every benchmark. Each prints a table, takes `--quick` (run by `make test`) and
`--json FILE`: one object a figure with `benchmark`, `case`, `metric`, `mean`, `std`, `n`, `unit`, and `peer` where the
figure is a peer's. This page is made from those files:

```sh
make bench                            # every benchmark in full, into build/bench/*.json, then
python docs/record.py build/bench/*.json
python docs/draw.py build/bench/tabular.json
```

Machine: {cores} shared and noisy, one thread a process; compare CPU-seconds and ratios, not clocks. ± is the
standard deviation over seeds or repetitions; a figure without it was measured once. `epsilon=0` is what a method makes of pure noise and
`no noise` what it makes of exact sums: no figure of a method means much without the two beside it.
"""

TABULAR = """## Tables

`python benchmarks/tabular.py --json FILE`. Users are records where a table has no user ids, patients in diabetes130 and
customers in online_retail. Coded Adult is priced at delta 1e-9 and all its records learn, as in the papers; of the
others a fifth of the people is held out, and `real` is how far those are off. TVD: mean total variation distance of all
k-way marginals of synthetic and real records, of threes at most 400, the same for all (lower is better). `p` is that the
difference from `marginals` is chance: paired t-tests over seeds, Holm's correction over all of them. CPU-s and memory
are those of learning and sampling in a process of its own, imports held but not counted as work; rounds are the
questions each client is asked, kB up and down what it sends and is sent in all. Peers run under their own interpreters,
once or as often as n says, on the same codes.

![Error by epsilon, and by CPU-seconds](tables.svg)
"""

SKEW = """## Skewed clients

`python benchmarks/skew.py --json FILE`: the people of the ACS excerpt dealt out to 20 clients, epsilon 1.
"""

USERS = """## Users with many records

`python benchmarks/users.py --json FILE`: all 71,518 patients of diabetes130 with up to 40 encounters each, 14 columns,
delta 1e-6. The error is the mean total variation of all 91 pairs' tables from those of the records. `tables` rows are
one noisy sum with nothing done to it; `method` rows are what a method learns from the same budget.
"""

RELATIONS = """## Users with their records

`python benchmarks/relations.py --json FILE`: patients with up to 10 encounters, customers with up to 20 lines. Each figure
is a mean total variation in which each user weighs one. `independent_records` are those of `mst`, each drawn by itself
and dealt out to users whose exact numbers of records it is told for free.
"""

DOMAIN = """## Domains found under privacy

`python benchmarks/domain.py --json FILE`: columns without declared categories or bounds, a tenth of the budget for
their domain, delta 1e-6, patients and customers as users. Records found: share whose category is found, beside what a
trusted server finds that sees all values. Heaviest bin: of those of 32 that hold several values.
"""

PE_TEXT = """## Federated text

`python benchmarks/pe_text.py --json FILE`: users of a chat room and roles in Shakespeare's plays, up to four texts each. SmolLM2-135M
writes and varies, users vote by MiniLM's embeddings, and the model expands what survived (`pre_text`). `epsilon=inf` is exact
votes, `epsilon=0` the same first pool without votes, expanded alike, `real` texts of other users. Accuracy: share of next tokens of users who
took no part that a small model guesses, trained on other public text and then on 300 texts of the row; its interval and `p over users` are of
a bootstrap over those users, `p over seeds` of a t-test over pools and models. Divergence: area under MAUVE's curve, higher for nearer, of which
`real` is the ceiling at that size. Lift is over `epsilon=0`. SmolLM2 has most likely read such texts before.
"""

DPDSYN = """## Task-guided

`python benchmarks/dpdsyn.py --json FILE`. Judges see 10,000 synthetic records and are tested on real ones of other people, on
the task (the schema's target) and off it (two other columns). `dpdsyn-...` are its other ways and features. The second table has the
ratios of `dpdsyn` to each other method, over tables, levels and seeds: mean, median and greatest; speed is the other's
CPU-seconds of learning and sampling over its own. Its settings were chosen on adult, smoking and acs_national2019, so its figures there
flatter a little.
"""

SCALING = """## Scaling

`python benchmarks/scaling.py --json FILE`: generated records of known structure, epsilon 1, delta 1e-9; each point is a
process of its own. TVD is that of 100,000 synthetic records and as many fresh ones of the same law; beside it that of as many other
fresh ones. Synthetic records are drawn with less chance than those, so they can lie closer.
"""

QUALITY = """## Images

`python benchmarks/quality.py --json FILE`. A user is an image. TVD is that of the labels; accuracy is that of judges trained
on synthetic images and tested on real ones of other people. The settings of `dp_merf`, `dp_fedavg` and
`private_evolution` were chosen on these digits and on Adult, so their figures flatter a little.
"""

VOTES = """## Votes

`python benchmarks/votes.py --json FILE`: one round of ten on a pool of 100 candidates, which are records of people who do not
vote, delta 1e-6; 2,000 users with at most 50 records each, all 439 writers that are left, and 20,000 patients. TV: total variation distance of the shares read from noisy votes
from the exact ones, with every user weighing one and with every record weighing one. The signal is a candidate's mean votes over the noise. It
is predicted from what a run file may declare, which was seen in 1,000 other users (500 of `irc`, 100 of `mnist_writers`): the records of twenty typical users, and how
often two records of a user vote alike in a pool of 100; from the same for pools of 25 and 400. Beside it stands what is predicted where
nothing but the number of users is declared. A TV that never varies: all votes were taken for noise, and shares left equal.
"""

PREFERENCES = """## Preferences and topics

`python benchmarks/preferences.py --json FILE`: users of a technical channel with four messages each, delta 1e-6. Recovery: of pairs
(the best response to a prompt and the fifth), as noisy scores of one of four rounds choose them, the share that exact mean cosines put in
the same order; a coin's is 0.5. Topics: a public corpus, half of it chat and half of it plays, resampled by a private histogram over 20
clusters; MAUVE-like against other chatters. Policy: mean cosine of what SmolLM2 writes with texts of other chatters.
"""

PE_IMAGES = """## Images by their writers

`python benchmarks/pe_images.py --json FILE`: `private_evolution` on MNIST, 539 writers as users with all of their digits, delta 1e-4;
judged by 297 other writers. TSTR: accuracy of a small network (and of a logistic regression) that saw 6,000 synthetic images alone; the
Fréchet distance, precision and recall are of 1,000 images on EfficientNet-Lite0 at 64 pixels. `strokes` are random curves, `glyphs` a network
that learned public alphabets, `digits` a renderer of digits (Sim-PE). `epsilon=0` is the first pool, `random votes` the same rounds with
all votes exchanged among a label's candidates, `no noise` exact sums, `real` as many records of the 539. `p` is that the difference from
those two is chance: paired t-tests over seeds, Holm's correction over all of one measure. When it ran, a number
of a reply took eight bytes; votes take four since, so halve kB up.
"""

TRAINING = """## Trained generators

`python benchmarks/training.py --json FILE`: MNIST, 539 writers as users with all of their digits, delta 1e-4; judged by 297 other
writers. TSTR: accuracy of a small network (and of a logistic regression) that saw 20,000 synthetic images alone; the Fréchet distance is of
1,000 images on EfficientNet-Lite0 at 64 pixels, as are precision and recall. `dp_merf` sees writers' digits by public features and `digits`
by random ones; of `dp_fedavg_gan` users train the critic. `scratch` is `dp_diffusion` with random weights, all of them trained by users; `scratch, warm`
starts from the classes' moments, and trains a head; `fine-tuned` has both that and networks of Omniglot; `moments alone` spends its whole
budget on moments. `epsilon=0` is what each makes of pure noise, `no noise` of exact sums, `real` as many records of the 539. The claims are
paired t-tests over seeds, Holm's correction over all of one measure. `digits` has one image a user.
"""

SENSITIVITY = """## Settings of training

`python benchmarks/sensitivity.py --json FILE`: a small autoencoder that is told the digit, trained by the updates of 1,438 users of one image
each over 30 rounds with Adam at the server, delta 1e-5. q is the probability that a user joins a round. Accuracy is that of a judge trained on
synthetic images alone. Clipped: share of updates longer than the clip; common: share of the clip that two users' updates have in common; signal:
the run's common pull beside its noise, measured after the run and as predicted from public facts. The last rows hold the best setting with noise
and the best without against each other, on seeds that the search did not see.
"""

CORRELATED_NOISE = """## Correlated noise

`python benchmarks/correlated_noise.py --json FILE`. Noise: standard deviation in one coordinate of a sum of rounds' sums, in clips, root mean
square over the first 1 ... 256 of 256 rounds, delta 1e-6; each user takes part in k rounds, so rows of one k have equal cohorts. `no
amplification`: independent noise priced as k sums; `coins`: priced as if users joined by secret coins; `banded` and `blt`: a series priced as one
sum. Digits: `dp_fedavg`, 100 rounds, 72 of 1,438 users a round, each way with the best of three server's steps, chosen on a seed of its own.
"""

PLANTED_BUG = """## A planted bug

`python benchmarks/planted_bug.py --json FILE`: `dp_fedavg_gan` on MNIST, 539 writers as users, epsilon 8, delta 1e-4. In the `buggy` population
half of the writers send inverted images; `clean` are the same writers without the bug, `epsilon=0` the same run on noise alone. Of 1,000 synthetic
images the share whose left and right edges are bright, which no writer fills; above a tenth is an alarm.
"""

THROUGHPUT = """## Throughput

`python benchmarks/throughput.py --json FILE`: 50 users of 20 images each train a classifier, two local steps of ten images,
updates clipped at 0.03, which cuts every update, 50 users a round. Ours is a whole run on the local engine, with ledger, odometer and noise; pfl 0.6 runs in an
environment of its own with the same torch, one process, `noise_cohort_size` the cohort's; Flower's simulation has one user a client, two
actors, neither clip nor noise. "Start-up excluded" is the cost of the second half of the rounds. The loop of bare torch is the client's part alone.
"""

KILLS = """## Kills

`python benchmarks/kills.py --json FILE`: runs killed with SIGKILL at random instants and at every fail point, and resumed.
"""

_OTHER = """## {name}

`python benchmarks/{name}.py --json FILE`
"""

_LEVELS = (
    "records",
    "epsilon=0",
    "epsilon=0.1",
    "epsilon=0.2",
    "epsilon=1",
    "epsilon=4",
    "epsilon=10",
    "no noise",
)
TRAINING_TEXT = """## Language models tuned by users

`python benchmarks/training_text.py --json FILE`: users of a chat room and roles in Shakespeare's plays, one text of each a round; `dp_lora`
on SmolLM2-135M, with its defaults. Accuracy: share of next tokens of 300 users who took no part that the tuned model itself guesses, after the
prompt it was tuned with. `epsilon=0` is the model after that prompt without adapters, `epsilon=inf` exact sums. Lift is over `epsilon=0`;
`p over users` is of a bootstrap over those users, `p over seeds` of a t-test. Settings were chosen with other users as judges; what that
choice tells of those who trained is not in epsilon. SmolLM2 has most likely read such texts before.
"""

LEVELS = """## Where to clip

`python benchmarks/levels.py --json FILE`: the same model and rounds, clipped by users' updates or by each record's gradient (by Opacus), both
priced for users. `mnist_writers`: a classifier, and its accuracy on other writers' digits; `online_retail`: a linear model of each column by those
before it, and its loss on other customers. The run below is of `--only mnist_writers --seeds 3`.
"""

_SECTIONS = (
    ("tabular", TABULAR, True),
    ("skew", SKEW, True),
    ("users", USERS, False),
    ("relations", RELATIONS, True),
    ("domain", DOMAIN, True),
    ("dpdsyn", DPDSYN, True),
    ("scaling", SCALING, True),
    ("quality", QUALITY, True),
    ("votes", VOTES, True),
    ("pe_images", PE_IMAGES, True),
    ("pe_text", PE_TEXT, True),
    ("training_text", TRAINING_TEXT, True),
    ("preferences", PREFERENCES, True),
    ("training", TRAINING, True),
    ("levels", LEVELS, True),
    ("sensitivity", SENSITIVITY, True),
    ("correlated_noise", CORRELATED_NOISE, True),
    ("planted_bug", PLANTED_BUG, True),
    ("throughput", THROUGHPUT, False),
    ("kills", KILLS, False),
)  # of each benchmark: its name, its heading, and whether its metrics stand side by side


def main() -> int:
    """Read the files named, write the page beside this one."""
    figures: list[dict[str, Any]] = []
    for name in sys.argv[1:]:
        figures += json.loads(Path(name).read_text(encoding="utf-8"))
    # parts of one benchmark, run apart with --only, repeat the figures of the real records
    figures = list({(f["benchmark"], f["case"], f["metric"]): f for f in figures}.values())
    if not figures:
        sys.stderr.write("give the JSON files of full runs\n")
        return 2
    page = Path(__file__).with_name("results.md")
    kept = _sections(page.read_text(encoding="utf-8")) if page.exists() else {}
    parts = [HEAD.format(cores=f"{os.cpu_count()} cores")]
    known = [name for name, *_ in _SECTIONS]
    others = sorted(({f["benchmark"] for f in figures} | set(kept)) - set(known))
    plain = [(name, _OTHER.format(name=name), False) for name in others]
    for benchmark, heading, by_case in (*_SECTIONS, *plain):
        found = [f for f in figures if f["benchmark"] == benchmark]
        if not found:
            parts += [kept[benchmark]] if benchmark in kept else []
            continue
        claims = [f for f in found if f["metric"] == "claim"]
        found = [f for f in found if f["metric"] != "claim"]
        parts += [heading, *(_by_case(found) if by_case else [_plain(found)])]
        if claims:
            said = [f"- {'holds' if f['mean'] else 'MISSED'}: {f['case']}" for f in claims]
            parts += ["\n".join(["Claims of that run:", "", *said, ""])]
    page.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return 0


def _sections(page: str) -> dict[str, str]:
    """The sections of a page, by the benchmark whose command each names."""
    found = {}
    for section in re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]:
        if named := re.search(r"`python benchmarks/(\w+)\.py", section):
            found[named[1]] = section.rstrip() + "\n"
    return found


def _by_case(figures: list[dict[str, Any]]) -> Iterable[str]:
    """A column for each metric; a table for each data set, where cases are named for one."""
    tables: dict[str, dict[tuple[str, ...], dict[str, Mapping[str, Any]]]] = {}
    for figure in figures:
        heading, names = _named(figure)
        tables.setdefault(heading, {}).setdefault(names, {})[figure["metric"]] = figure
    for heading, rows in tables.items():
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        columns = [*(("method", "level") if heading else ("case",)), *metrics, "n"]
        lines = [f"### {heading}", ""] if heading else []
        lines += [_row(columns), "|---" * len(columns) + "|"]
        for names, cells in rows.items():
            shown = [_shown(cells[m]) if m in cells else "" for m in metrics]
            lines.append(_row([*names, *shown, str(max(f["n"] for f in cells.values()))]))
        yield "\n".join([*lines, ""])


def _named(figure: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The data set that a case is named for, if any, and what else it is called."""
    table, _, rest = figure["case"].partition(" ")
    method, _, level = rest.partition(" ")
    if level not in _LEVELS or "," in table:
        return "", (figure["case"],)
    peer = f" ({figure['peer']})" if figure.get("peer") else ""
    return table, (f"`{method}`{peer}", level)


def _row(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def _plain(figures: list[dict[str, Any]]) -> str:
    """One row a figure."""
    lines = ["| case | metric | figure | n |", "|---|---|---|---|"]
    for f in figures:
        peer = f" ({f['peer']})" if f.get("peer") else ""
        lines.append(f"| {f['case']}{peer} | {f['metric']} | {_shown(f)} {f['unit']} | {f['n']} |")
    return "\n".join([*lines, ""])


def _shown(figure: Mapping[str, Any]) -> str:
    """A mean and its spread."""
    mean = f"{figure['mean']:.3g}" if abs(figure["mean"]) < 1000 else f"{figure['mean']:,.0f}"
    return f"{mean} ± {figure['std']:.2g}" if figure["n"] > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
