# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders share."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = str(Path(__file__).resolve().parent.parent / "benchmarks")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
CHAT = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def benchmark_of():
    """Imports a benchmark by name; whatever threads it asks for are forgotten afterwards."""
    before = {name: os.environ.get(name) for name in THREADS}
    sys.path.insert(0, FOLDER)
    yield importlib.import_module
    sys.path.remove(FOLDER)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders with a tiny Llama of random weights and a tokenizer of bytes.

    It is called with words for the model's configuration and, if need be, with `template`, `end`
    and `begin` of a chat and `is_letter`, which bytes there are.
    """

    def made(
        *,
        template: str = CHAT,
        end: str = "<e>",
        begin: str | None = None,
        is_letter: Callable[[str], bool] = bool,
        **config: float,
    ) -> Path:
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        path = tmp_path_factory.mktemp("tiny")
        letters = sorted(filter(is_letter, pre_tokenizers.ByteLevel.alphabet()))
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        begins = {} if begin is None else {"bos_token": begin}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, **begins)
        fast.chat_template = template
        fast.save_pretrained(path)
        settings = {
            "vocab_size": len(fast),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "eos_token_id": fast.eos_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**settings | config)).save_pretrained(path)
        return path

    return made
