# SPDX-License-Identifier: Apache-2.0
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from fedsynth.core.errors import ConfigError, FedsynthError, SecurityRefusal
from fedsynth.models.language import MAX_SEED, LanguageModel, Prompt, side_by_side
from fedsynth.models.replies import Replies
from fedsynth.models.variation import Capabilities, Estimate

ROOT = Path(__file__).resolve().parents[2]
RUDE = Path(__file__).with_name("rude_server.py")
ASKED = "http://127.0.0.1:{}/asked/working"
AT_ONCE, NUM = 4, 80
PROMPTS = [Prompt("Tell me.", seed=seed) for seed in range(4)]


@pytest.fixture
def server() -> Iterator[str]:
    """Port of an endpoint that works, slowly."""
    with subprocess.Popen(
        [sys.executable, str(RUDE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


@dataclass(frozen=True)
class Scribe(LanguageModel):
    """Writes down what it was asked, and replies by its seed; it may stop short, or break."""

    asked: list[int]
    last: int = MAX_SEED
    breaks: bool = False
    refuses: int = -1
    forces_openings: ClassVar[bool] = False  # type: ignore[misc]
    name: ClassVar[str] = "scribe"

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        for position, prompt in reversed(list(enumerate(prompts))):
            if prompt.seed > self.last:
                if self.breaks:
                    raise FedsynthError("out of ink")
                continue
            self.asked.append(prompt.seed)
            yield position, None if prompt.seed == self.refuses else f"reply {prompt.seed}"

    def fingerprint(self) -> str:
        return "scribe"

    def capabilities(self) -> Capabilities:
        return Capabilities("text")

    def estimate(self, prompts: Sequence[Prompt]) -> Estimate:
        return Estimate()


@dataclass(frozen=True)
class OtherScribe(Scribe):
    def fingerprint(self) -> str:
        return "another"


def test_replies_come_in_the_prompts_order():
    with Replies(None) as kept:
        found = kept.completed(Scribe([]), PROMPTS)

    assert found == ["reply 0", "reply 1", "reply 2", "reply 3"]


def test_what_is_kept_is_not_asked_again(tmp_path: Path):
    asked: list[int] = []
    with Replies(tmp_path / "replies.db") as kept:
        kept.completed(Scribe(asked), PROMPTS[:2])

    with Replies(tmp_path / "replies.db") as kept:
        found = kept.completed(Scribe(asked), PROMPTS)

    assert found == ["reply 0", "reply 1", "reply 2", "reply 3"]
    assert sorted(asked) == [0, 1, 2, 3]


def test_equal_prompts_are_asked_once():
    asked: list[int] = []

    with Replies(None) as kept:
        found = kept.completed(Scribe(asked), [PROMPTS[1], PROMPTS[0], PROMPTS[1]])

    assert found == ["reply 1", "reply 0", "reply 1"]
    assert sorted(asked) == [0, 1]


def test_a_refusal_is_kept():
    asked: list[int] = []

    with Replies(None) as kept:
        first = kept.completed(Scribe(asked, refuses=1), PROMPTS[:2])
        again = kept.completed(Scribe(asked), PROMPTS[:2])

    assert first == again == ["reply 0", None]
    assert sorted(asked) == [0, 1]


@pytest.mark.parametrize("breaks", [True, False])
def test_a_model_that_fails_half_way_is_asked_for_the_rest_alone(breaks: bool):
    asked: list[int] = []

    with Replies(None) as kept:
        with pytest.raises(FedsynthError, match="out of ink" if breaks else "2 of 4 prompts"):
            kept.completed(Scribe(asked, last=1, breaks=breaks), PROMPTS[::-1])
        found = kept.completed(Scribe(asked), PROMPTS)

    assert found[3] == "reply 3"
    assert Counter(asked) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_another_model_is_asked_for_its_own_replies():
    asked: list[int] = []

    with Replies(None) as kept:
        kept.completed(Scribe(asked), PROMPTS)
        kept.completed(OtherScribe(asked), PROMPTS)

    assert len(asked) == 8


def test_a_reply_is_in_the_file_before_the_next_one_is_asked_for(tmp_path: Path):
    file = tmp_path / "replies.db"
    seen: list[int] = []

    @dataclass(frozen=True)
    class Watcher(Scribe):
        def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
            for pair in super().replies(prompts):
                yield pair
                with closing(sqlite3.connect(file)) as other:
                    seen.append(other.execute("SELECT count(*) FROM replies").fetchone()[0])

    with Replies(file) as kept:
        kept.completed(Watcher([]), PROMPTS)

    assert seen == [1, 2, 3, 4]


def test_of_two_processes_the_first_reply_stands(tmp_path: Path):
    file = tmp_path / "replies.db"

    @dataclass(frozen=True)
    class Overtaken(Scribe):
        def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
            with Replies(file) as other:
                other.completed(Scribe([]), prompts)
            yield from ((position, "too late") for position in range(len(prompts)))

    with Replies(file) as kept:
        assert kept.completed(Overtaken([]), PROMPTS[:1]) == ["reply 0"]


def test_every_word_of_a_prompt_is_in_its_digest():
    prompt = Prompt("a")
    others = [
        Prompt("b"),
        Prompt("a", system="b"),
        Prompt("a", max_tokens=9),
        Prompt("a", temperature=0.5),
        Prompt("a", top_p=0.5),
        Prompt("a", seed=1),
        Prompt("a", turns=(("b", "c"),)),
        Prompt("a", opening="b"),
        Prompt("a", stop=("b",)),
        Prompt("a \ud800"),
    ]

    assert len({p.digest for p in [prompt, *others]}) == 11
    assert replace(others[-1]).digest == others[-1].digest


@pytest.mark.parametrize(
    "settings",
    [
        *({"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}),
        *({"top_p": 0.0}, {"seed": -1}, {"seed": MAX_SEED + 1}),
    ],
)
def test_a_prompt_out_of_range_is_refused(settings: dict[str, float]):
    with pytest.raises(ConfigError, match="a prompt needs"):
        Prompt("a", **settings)  # type: ignore[arg-type]


def test_replies_that_no_utf8_can_hold_are_kept_as_they_can():
    @dataclass(frozen=True)
    class Odd(Scribe):
        def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
            yield 0, "so \ud800 odd\0"

    with Replies(None) as kept:
        assert kept.completed(Odd([]), PROMPTS[:1]) == ["so ? odd\0"]
        assert kept.completed(Odd([]), PROMPTS[:1]) == ["so ? odd\0"]


def test_the_file_is_for_its_owner_alone(tmp_path: Path):
    Replies(tmp_path / "new" / "replies.db").close()

    assert stat.S_IMODE((tmp_path / "new" / "replies.db").stat().st_mode) == 0o600


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_text("not a database" * 100)
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE mine (a)")

    for file in (text, other):
        with pytest.raises(SecurityRefusal, match="not a store of replies"):
            Replies(file)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot keep replies at"):
        Replies(tmp_path / "file" / "replies.db")


def test_side_by_side_never_runs_further_ahead_than_told():
    begun: list[int] = []

    def ask(position: int) -> int:
        begun.append(position)
        return position * 2

    stream = side_by_side(ask, 50, 3)
    first = list(islice(stream, 10))
    time.sleep(0.1)

    assert all(doubled == 2 * position for position, doubled in first)
    assert len(begun) <= 10 + 3
    assert len(list(stream)) == 40


def test_side_by_side_hands_over_what_runs_before_it_raises():
    gate = threading.Event()

    def ask(position: int) -> int:
        if position == 1:
            gate.set()
            raise FedsynthError("second")
        gate.wait(5)
        time.sleep(0.1)
        return position

    stream, came = side_by_side(ask, 9, 3), []
    with pytest.raises(FedsynthError, match="second"):
        came.extend(stream)

    assert sorted(position for position, _ in came) == [0, 2]


def buyer(port: str, file: Path) -> "subprocess.Popen[bytes]":
    """A process that buys all replies and keeps them."""
    script = f"""
from pathlib import Path
from fedsynth.models.endpoint import Endpoint
from fedsynth.models.language import Prompt
from fedsynth.models.replies import Replies
model = Endpoint("http://127.0.0.1:{port}/working/v1", "m", at_once={AT_ONCE})
with Replies(Path({str(file)!r})) as kept:
    found = kept.completed(model, [Prompt(f"prompt {{i}}", seed=i) for i in range({NUM})])
assert found == [f"A reply to seed {{i}}." for i in range({NUM})], found
"""
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)


def held_in(file: Path) -> set[str]:
    """Texts of the prompts whose replies a file holds, while another process may be writing it."""
    texts = {Prompt(f"prompt {i}", seed=i).digest: f"prompt {i}" for i in range(NUM)}
    if not file.exists():
        return set()
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)) as db:
        try:
            return {texts[digest] for (digest,) in db.execute("SELECT prompt FROM replies")}
        except sqlite3.OperationalError:  # no table yet
            return set()


def test_a_process_that_is_killed_again_and_again_buys_no_kept_reply_twice(
    server: str, tmp_path: Path
):
    file, chance, num_kills = tmp_path / "replies.db", random.Random(5), 0
    asked: list[str] = []
    while len(held := held_in(file)) < NUM:
        process, enough = buyer(server, file), len(held) + chance.randint(5, 20)
        while process.poll() is None and (len(held_in(file)) < enough or enough > NUM):
            time.sleep(0.002)
        process.kill()
        num_kills += process.wait() != 0
        now = [text for _, text, _ in httpx.get(ASKED.format(server), trust_env=False).json()]

        assert not held & set(now[len(asked) :])
        asked = now

    assert num_kills >= 2
    assert len(set(asked)) == NUM
    assert len(asked) <= NUM + num_kills * AT_ONCE  # those on their way when it was killed
