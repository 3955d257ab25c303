# SPDX-License-Identifier: Apache-2.0
"""Diffusion: classes' moments by two noisy sums, then what they lack, by users' clipped updates."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.checkpoint import State
from ..core.errors import ConfigError
from ..core.leaf import Leaf
from ..core.query import Contribution, NoisySum, Query, Steps
from ..core.records import BoundedShard
from ..core.schema import Schema
from .parts.class_moments import ClassMoments, Measuring, kept
from .parts.codec import FARTHEST, STEPS, Codec, Start, codec_for
from .parts.denoiser import Denoiser, Layout, Scope, directions_of, labels_of
from .parts.diffusion import Diffusion
from .parts.generator import label_column
from .parts.settings import check_range
from .parts.trainable import RecordShape, Trainable
from .parts.training import Training
from .parts.width import MOST_NUMBERS, refuse_wide

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

_MEANS, _COVARIANCES, _UPDATE = "means", "covariances", "update"
_FIRST = 0.25  # of what moments may cost, for the means
_LEARNED_WIDTH = 256  # of the denoiser that public data taught
_MOST_MEAN, _MOST_BACK = 1 << 20, 1 << 16  # in steps: products with records are then exact


@dataclass(frozen=True)
class DpDiffusion(Training):
    """A diffusion model of images in a few public numbers each, trained at the level of users.

    First two noisy sums tell mean and covariance of each class: the model's warm start, which is
    one Gaussian a class. Then users train a small denoiser, by clipped updates as in `dp_fedavg`,
    in what a class has beyond its Gaussian. Each noisy sum is drawn towards nothing by as much of
    it as noise explains: under much noise little is learned, and little is spoiled.

    With `start = "handwriting"` the numbers, the denoiser and what is thought of a class before it
    is measured come from public scripts (Omniglot), and users fine-tune; with `"scratch"` the
    numbers are cosines and the denoiser is random.

    The schema is an image and at most one category, the label.

    Attributes:
      label: Column that records are told apart by; `None`: the schema's target if that is a
        category; `""`: none.
      start: `handwriting`: from networks of public scripts, for gray images of 28 x 28; `scratch`:
        from nothing, for images of any size.
      scope: Which weights of the denoiser are trained: `all`; or the `head`, its last layer in
        few directions, so that there is less noise and few rounds are enough.
      warm_share: Fraction of the budget that is spent on the moments; 0: they are not asked for;
        1: nothing else is.
      multiplicity: Draws of noise over which a record's loss is averaged.
      rank: Directions in which a head is trained.
      width: Units of the denoiser's hidden layers; of one that was learned, as it was.
      num_sampling_steps: Steps from noise to an image, when records are sampled.

    Reference:
      Dockhorn et al. (2023), "Differentially Private Diffusion Models", arXiv 2210.09929;
      Liu et al. (2023), "Differentially Private Latent Diffusion Models", arXiv 2305.15759, for
      training in the latent space of a public autoencoder. The warm start follows Li et al.
      (2025), "From Easy to Hard", arXiv 2504.01395, with moments in place of mean images.
    """

    name: ClassVar[str] = "dp_diffusion"
    num_rounds: int = 4
    sampling_prob: float = 1.0
    local_lr: float = 1.0
    server_optimizer: str = "fedavgm"
    server_lr: float = 0.7
    momentum: float = 0.0
    clip: float = 3.0
    label: str | None = None
    start: Start = "handwriting"
    scope: Scope = "head"
    warm_share: float = 0.7
    multiplicity: int = 4
    rank: int = 64
    width: int = 128
    num_sampling_steps: int = 16

    def check(self) -> None:
        """Refuse what cannot be."""
        check_range(1, 1000, multiplicity=self.multiplicity)
        check_range(1, 4096, width=self.width, rank=self.rank)
        check_range(2, 1000, num_sampling_steps=self.num_sampling_steps)
        if self.level != "user" or self.correlation != "none":
            raise ConfigError(
                "dp_diffusion has few rounds, of sums over users: leave out level and correlation"
            )
        if not 0 <= self.warm_share <= 1:
            raise ConfigError(f"warm_share must lie in [0, 1], not {self.warm_share!r}")
        if self.start not in ("handwriting", "scratch"):
            raise ConfigError(f"start must be 'handwriting' or 'scratch', not {self.start!r}")
        if self.scope not in ("head", "all"):
            raise ConfigError(f"scope must be 'head' or 'all', not {self.scope!r}")

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """Two sums for the moments and `num_rounds` for updates, by their shares."""
        from ..core.accounting import event_of

        self._optimizer().build(seed=0)
        codec, label = self._codec(schema)
        layout = self._layout(codec, RecordShape.of(schema), label)
        moments = self._around(codec, layout, noise_multiplier)
        weights = sum(math.prod(shape) for shape in layout.shapes.values())
        refuse_wide(schema, self.name, max(moments.dim, weights, layout.num_classes * 4096))
        *warm, update = self._noise(noise_multiplier)
        asked = Counter(Leaf(noise, 1.0) for noise in warm if self.warm_share)
        if self.warm_share < 1:
            asked[Leaf(update, float(self.sampling_prob))] += self.num_rounds
        return event_of(asked)

    def rounds_from(
        self,
        schema: Schema,
        noise_multiplier: float,
        rng: np.random.Generator,
        state: State | None,
    ) -> Steps:
        """Ask for moments, then for updates of the denoiser that goes with them.

        It keeps no checkpoint: its rounds are few, and replay is quick.
        """
        if state is not None:
            raise ConfigError("dp_diffusion keeps no checkpoints, so this is another strategy's")
        shape = RecordShape.of(schema)
        codec, label = self._codec(schema)
        layout = self._layout(codec, shape, label)
        public: dict[str, NDArray[Any]] = {
            **shape.inputs(),
            "label": np.array([label], dtype=np.int64),
            "digest": codec.digest(),
        }
        *warm, update = self._noise(noise_multiplier)
        moments = ClassMoments.unknown(codec, layout.num_classes)
        if self.warm_share:
            first = Measuring(layout.num_classes, layout.num_latents)
            noisy = yield self._asked(_MEANS, first, warm[0], public, moments)
            moments = first.means(noisy, moments)
            around = self._around(codec, layout, noise_multiplier)
            noisy = yield self._asked(_COVARIANCES, around, warm[1], public, moments)
            moments = around.covariances(noisy, moments)
        told: dict[str, NDArray[Any]] = {**public, **moments.inputs(), "roots": moments.roots()}
        start = layout.initial(codec.denoiser(), _public())
        told["directions"] = np.zeros((layout.width + 1, 0), dtype=np.float32)
        if self.scope == "head":
            told["directions"] = directions_of(start, moments, self._rank(layout), rng)
        model = self._denoiser(layout, codec, label, told, start)
        weights = model.initial(rng)
        if self.warm_share < 1:
            steps = self.updates_from(weights, update, rng)
            mean, counted = np.zeros_like(steps.weights), 0
            for number in range(self.num_rounds):
                noisy = yield steps.ask(told)
                now = steps.take(_without_noise(noisy, len(weights)))
                if number >= self.num_rounds // 2:
                    counted += 1
                    mean += (now - mean) / counted
            weights = mean.astype(np.float32)
        return Diffusion(
            schema,
            label,
            self.start,
            moments.shares,
            (told["means"] / 256).astype(np.float32),
            told["roots"],
            self.num_sampling_steps,
            model.whole(weights),
        )

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each user's moments, or the change of the weights that the user trains."""
        shape = RecordShape.from_inputs(query.inputs)
        codec = codec_for(self.start, shape.image)
        label = _label_of(query, shape)
        if not np.array_equal(query.inputs.get("digest", ()), codec.digest()):
            raise ConfigError(
                "the server's public weights are not those of this client; install the same"
                " version of fedsynth at both"
            )
        layout = self._layout(codec, shape, label)
        if query.name in (_MEANS, _COVARIANCES):
            return self._moments(query, shard, shape, codec, layout, label)
        model = self._told(query, codec, layout, label)
        return self.contribution(model, shape, query, shard, rng)

    def model_for(self, shape: RecordShape) -> Trainable:
        """The denoiser of records of which nothing was measured, and no label is known."""
        codec = codec_for(self.start, shape.image)
        layout = self._layout(codec, shape, -1)
        unknown = ClassMoments.unknown(codec, 1)
        directions = np.zeros((layout.width + 1, self._rank(layout)), dtype=np.float32)
        told = {**unknown.inputs(), "roots": unknown.roots(), "directions": directions}
        first = layout.initial(codec.denoiser(), _public())
        return self._denoiser(layout, codec, -1, told, first)

    def _moments(
        self,
        query: Query,
        shard: BoundedShard,
        shape: RecordShape,
        codec: Codec,
        layout: Layout,
        label: int,
    ) -> Contribution:
        """Each user's vector for the moments."""
        weight, centers = query.inputs.get("second_weight"), query.inputs.get("centers")
        if weight is None or weight.shape != (1,) or not 0 <= float(weight[0]) <= 1:
            raise ConfigError("the request does not say how second moments are weighted")
        fits = (layout.num_classes, layout.num_latents)
        if (
            centers is None
            or centers.shape != fits
            or centers.dtype != np.int32
            or (np.abs(centers.astype(np.int64)) > FARTHEST * STEPS).any()
        ):
            raise ConfigError("the request's centers do not fit the records it describes")
        asked = Measuring(*fits, float(weight[0]))
        if query.dim != asked.dim:
            raise ConfigError("the request for moments does not fit the records it describes")
        shape.check(shard.records)
        if shard.records.images is None:
            raise ConfigError("records without images")
        codes = codec.encoded(shard.records.images)
        return Contribution.rows(asked.rows(shard, codes, labels_of(shard.records, label), centers))

    def _told(self, query: Query, codec: Codec, layout: Layout, label: int) -> Denoiser:
        """The denoiser that a request describes."""
        size, classes = layout.num_latents, layout.num_classes
        expected = {
            "means": ((classes, size), np.int32),
            "backs": ((classes, size, size), np.int32),
            "roots": ((classes, size, size), np.float32),
            "directions": ((layout.width + 1, self._rank(layout)), np.float32),
        }
        told: dict[str, NDArray[Any]] = {}
        for name, (fits, dtype) in expected.items():
            array = query.inputs.get(name)
            if array is None or array.shape != fits or array.dtype != dtype:
                raise ConfigError(f"the request's {name} do not fit the records it describes")
            told[name] = array
        for name, most in (("means", _MOST_MEAN), ("backs", _MOST_BACK)):
            if (np.abs(told[name].astype(np.int64)) > most).any():
                raise ConfigError(f"the request's {name} are beyond any that are measured")
        first = layout.initial(codec.denoiser(), _public())
        return self._denoiser(layout, codec, label, told, first)

    def _denoiser(
        self,
        layout: Layout,
        codec: Codec,
        label: int,
        told: Mapping[str, NDArray[Any]],
        first: Mapping[str, NDArray[np.float32]],
    ) -> Denoiser:
        """The denoiser of classes whose moments are told, from some weights on."""
        return Denoiser(
            layout,
            self.scope,
            self.multiplicity,
            label,
            codec,
            told["means"],
            told["backs"],
            told["roots"],
            first,
            told["directions"],
        )

    def _rank(self, layout: Layout) -> int:
        """Directions in which a head is trained."""
        return min(self.rank, layout.width + 1) if self.scope == "head" else 0

    @property
    def _is_learned(self) -> bool:
        """Whether there are public weights to start from."""
        return self.start != "scratch"

    def _codec(self, schema: Schema) -> tuple[Codec, int]:
        """The code of a schema's images, and the label's position.

        Raises:
          ConfigError: The schema is not an image and at most one category.
        """
        codec = codec_for(self.start, schema.image.shape if schema.image else None)
        label = label_column(schema, self.label)
        beside = [name for at, name in enumerate(schema.names) if at != label]
        if beside:
            raise ConfigError(
                f"dp_diffusion makes an image and one label, and the schema also has"
                f" {', '.join(beside)}; leave them out, name one as label, or take dp_fedavg"
            )
        return codec, label

    def _layout(self, codec: Codec, shape: RecordShape, label: int) -> Layout:
        """Sizes of the denoiser."""
        num_classes = shape.cells[label] if label >= 0 else 1
        width = _LEARNED_WIDTH if self._is_learned else self.width
        if num_classes * max(codec.num_latents**2, width) > MOST_NUMBERS:
            raise ConfigError("the records have more classes and numbers than a denoiser can hold")
        return Layout(codec.num_latents, num_classes, width)

    def _around(self, codec: Codec, layout: Layout, noise_multiplier: float) -> Measuring:
        """How covariances are asked for under the noise of a run."""
        return Measuring.around(
            layout.num_classes,
            codec.num_latents,
            num_users=self.num_users,
            noise_multiplier=self._noise(noise_multiplier)[1],
        )

    def _asked(
        self,
        name: str,
        asked: Measuring,
        noise_multiplier: float,
        public: Mapping[str, NDArray[Any]],
        known: ClassMoments,
    ) -> Query:
        """The question for moments around what is known of them."""
        weight = np.array([asked.second_weight])
        inputs = {**public, "second_weight": weight, "centers": known.centers()}
        return Query(name, asked.dim, asked.clip, noise_multiplier, inputs=inputs)

    def _noise(self, noise_multiplier: float) -> tuple[float, float, float]:
        """Noise multipliers of means, covariances and an update, by their shares of mu^2."""
        reach = self.sampling_prob * math.sqrt(self.num_rounds)
        shares = (self.warm_share * _FIRST, self.warm_share * (1 - _FIRST))
        warm = [noise_multiplier / (reach * math.sqrt(share)) if share else 1.0 for share in shares]
        rest = 1 - self.warm_share
        return warm[0], warm[1], noise_multiplier / math.sqrt(rest) if rest else 1.0


def _public() -> np.random.Generator:
    """Source of a denoiser's random weights, which clients draw as the server does."""
    return np.random.default_rng(0)


def _without_noise(noisy: NoisySum, num_weights: int) -> NoisySum:
    """A noisy update drawn towards nothing, by as much of it as noise explains."""
    if noisy.is_void:
        return noisy
    update = noisy.vector[:num_weights]
    share = kept(noisy.stddev**2 * num_weights, (update**2).sum())
    return replace(noisy, vector=np.concatenate([share * update, noisy.vector[num_weights:]]))


def _label_of(query: Query, shape: RecordShape) -> int:
    """Position of the label column that a request names."""
    label = query.inputs.get("label")
    if label is None or label.shape != (1,) or not -1 <= int(label[0]) < len(shape.cells):
        raise ConfigError("the request does not say which column is the label")
    return int(label[0])
