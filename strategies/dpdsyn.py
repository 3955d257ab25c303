# SPDX-License-Identifier: Apache-2.0
"""DPDSyn, a reconstruction: features from any tabular method, labels from a private classifier."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError
from ..core.query import Contribution, NoisySum, Query, Steps, Strategy, trusts_server
from ..core.records import BoundedShard, Records
from ..core.schema import Schema
from ..core.synthesizer import Synthesizer
from .independent import Columns
from .parts.coarsen import coarsen
from .parts.histograms import Grid
from .parts.measuring import tables_only
from .parts.rounding import spread
from .parts.softmax import Lookup, Newton, Softmax, contrasts, roughness

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

Mode = Literal["label", "accept", "invert"]

_UNIFORM = "uniform"
_PREFIX = "features."
_GRADIENT = "classifier"
_SAMPLE = 10_000  # synthetic records that the curvature is taken from
_PENALTY = 2.0  # of the weights, in standard deviations of one sum's noise in the mean gradient
_LEAST_PENALTY = 1e-6  # keeps the bound invertible: a column's groups add up to the intercept
_CLEAR = 3.0  # standard deviations from which a count of users is more than noise
_BATCHES = 50  # of candidates, before those still missing are labelled outright
_BLOCK = 1 << 22  # numbers in a block of candidates' logits


@dataclass(frozen=True)
class DpdSyn(Strategy):
    """Records made for one task: to train models that predict the schema's target.

    1. ``features.*``: another method learns all columns but the target.
    2. ``classifier``: a multinomial logistic regression of the target is trained by sums of
       users' gradients, each user's the mean over their records. Every user joins every round.
       The first sum, at zero weights, is the linear statistic X'(y - prior): with the features'
       curvature it gives the least-squares classifier, the warm start. Each later sum is one step
       of Böhning and Lindsay's method, whose curvature comes from the features' synthesizer, so
       it costs nothing; the steps shorten, which averages noise out.
    3. A record is drawn from the features' synthesizer and its target from the classifier.

    A RECONSTRUCTION. Of the paper only the abstract could be read: train a private model of the
    downstream task, then synthesize by it. How the second step is done is not public; three ways
    are offered (`mode`), of which `label` was the best wherever measured.

    Attributes:
      features: Method for the features, by name; or `uniform`: nothing is learnt of them.
      feature_settings: Its settings.
      feature_share: Its share of the budget (of mu^2); the classifier has the rest.
      num_steps: Sums of gradients.
      clip_share: L2 bound of a user's gradient, as a share of the norm of a record's design row;
        a gradient is at most sqrt(2) times that norm. The first one is never clipped; it also
        counts users and classes, and the classes' shares come from it alone.
      max_groups: Most groups of a column's cells that the classifier tells apart.
      max_classes: Most cells of the target, each a class of its own: a number's bins too.
      mode: `label`: the target is drawn given the features. `accept`: a class and features are
        drawn apart, and kept with the class's probability to the power of `sharpness`.
        `invert`: features are moved, column by column, to where the class drawn is likeliest.
      sharpness: Of `accept`; >= 0.
      num_moves: Of `invert`.

    Privacy:
      A query for the features is another method's, and bounds a user as that method does. In a
      classifier query a record's vector is its residual, times its design row; a user's is the
      mean over their records, clipped. The sum is divided by a noisy count of users.

    Reference:
      Jia, Huang, Zhao, Wang, Peng, Zhang (2026), "Improving DP Dataset Synthesis for Model
      Training by Downstream Task Guidance", abstract, https://arxiv.org/abs/2604.15660.
    """

    features: str = "marginals"
    feature_settings: dict[str, Any] = field(default_factory=dict)
    feature_share: float = 0.35
    num_steps: int = 8
    clip_share: float = 0.7
    max_groups: int = 20
    max_classes: int = 32
    mode: Mode = "label"
    sharpness: float = 1.0
    num_moves: int = 16
    name: ClassVar[str] = "dpdsyn"
    caution: ClassVar[str] = (
        "These records were made for one task: to train models that predict the target. What"
        " other columns have to do with each other is only as good as the method for the features"
        " and its smaller share of the budget. Do not use the records for another task."
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot mean anything."""
        if ":" in self.features or self.features == self.name:
            raise ConfigError(
                f"features = {self.features!r}: expected the name of an installed method for"
                f" tables, such as 'marginals' or 'mst', or {_UNIFORM!r}"
            )
        if not 0 < self.feature_share < 1:
            raise ConfigError(f"feature_share must lie between 0 and 1, not {self.feature_share!r}")
        if not 0 < self.clip_share < 1e6:
            raise ConfigError(f"clip_share must be above 0, not {self.clip_share!r}")
        if not 0 <= self.sharpness < 1e3:
            raise ConfigError(f"sharpness must be 0 or more, not {self.sharpness!r}")
        for key, least in (("num_steps", 1), ("max_groups", 2), ("max_classes", 2)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} must be {least} or more, not {getattr(self, key)!r}")
        if self.num_moves < 0:
            raise ConfigError(f"num_moves must be 0 or more, not {self.num_moves!r}")
        if self.features == _UNIFORM:
            if self.feature_settings:
                raise ConfigError("uniform features have no settings: leave feature_settings out")
        else:
            self._method()

    @property
    def trusts_server(self) -> bool:
        """Whether the features' method has the server choose by exact sums."""
        return self.features != _UNIFORM and trusts_server(self._method())

    def event(self, schema: Schema, noise_multiplier: float) -> "DpEvent":
        """The features' event, and one Gaussian sum a step."""
        from ..core.accounting import compose, single_event

        self._target(schema)
        for_features, _, noise = self._noise(noise_multiplier)
        events = [single_event(noise)] * self.num_steps
        if self.features != _UNIFORM:
            events.append(self._method().event(features_of(schema), for_features))
        return compose(events)

    def rounds(self, schema: Schema, noise_multiplier: float, rng: np.random.Generator) -> Steps:
        """Learn the features, then the classifier on groups that the features call for."""
        target = self._target(schema)
        for_features, whole, noise = self._noise(noise_multiplier)
        apart = features_of(schema)
        if self.features == _UNIFORM:
            features: Synthesizer = Columns(apart, tuple(np.full(c, 1 / c) for c in apart.shape))
        else:
            features = yield from self._features(apart, target, for_features, rng)
        codes = with_target(features.sample(_SAMPLE, rng).codes, target)
        grids = self._grids(schema, codes, target)
        lookup = Lookup.of(grids)
        ordered = [schema.columns[grid.column].num_ordered_cells for grid in grids]
        rough = roughness(grids, ordered)
        gram = lookup.gram(codes)

        weights = np.zeros((lookup.num_rows, schema.shape[target] - 1))
        newton: Newton | None = None
        shares: NDArray[np.float64] | None = None
        num_users, steps = 0.0, 0
        for _ in range(self.num_steps):
            query = self._query(
                lookup, weights, target, noise, counts_users=newton is None or not weights.size
            )
            noisy: NoisySum = yield query
            if noisy.is_void:
                continue
            if newton is None:  # the first sum that arrived also counts users
                num_users = float(noisy.vector[-1])
                if num_users < _CLEAR * noisy.stddev:
                    num_users = math.inf  # nothing is known; the steps are nil, but still asked
                stddev = whole * self.clip_share * lookup.row_norm / num_users
                penalty = _PENALTY * stddev * rough + _LEAST_PENALTY * np.eye(len(rough))
                newton = Newton.of(gram, penalty)
                shares = self._shares(noisy, weights.shape, num_users)
            gradient = noisy.vector[: weights.size].reshape(weights.shape) / num_users
            weights = weights + min(1.0, 2 / (steps + 2)) * newton.step(weights, gradient)
            steps += 1
        model = Softmax(lookup, weights)
        if shares is not None:
            model = model.balanced(codes, shares)
        return Guided(schema, features, model, self.mode, self.sharpness, self.num_moves)

    def answer(self, query: Query, shard: BoundedShard, rng: np.random.Generator) -> Contribution:
        """Each user's gradient; or what the features' method answers, of all but the target."""
        target = _checked_target(query, shard.records.codes.shape[1])
        if query.name != _GRADIENT:
            inputs = {key: value for key, value in query.inputs.items() if key != "target"}
            asked = replace(query, name=query.name.removeprefix(_PREFIX), inputs=inputs)
            records = Records(np.delete(shard.records.codes, target, axis=1))
            return self._method().answer(asked, replace(shard, records=records), rng)
        model = _checked_model(query, shard.records.codes.shape[1])
        codes = shard.records.codes
        residuals = model.residuals(codes, codes[:, target])
        rows = model.lookup.of_codes(codes)
        width = residuals.shape[1]
        cells = (rows[:, :, None] * width + np.arange(width)).reshape(
            len(codes), rows.shape[1] * width
        )
        scales = np.tile(residuals, (1, rows.shape[1]))
        if query.dim > model.weights.size:
            cells = np.column_stack([cells, np.full(len(codes), query.dim - 1)])
            scales = np.column_stack([scales, np.ones(len(codes))])
        return Contribution.cells(
            cells, shard.user_index, num_users=shard.num_users, scales=scales
        ).user_means()

    def _method(self) -> Strategy:
        """The method for the features."""
        from .registry import build_strategy

        return build_strategy(self.features, self.feature_settings)

    def _target(self, schema: Schema) -> int:
        """Position of the column that the classifier predicts.

        Raises:
          ConfigError: There is none, or it has too many cells, or nothing predicts it.
        """
        tables_only(schema, self.name)
        if schema.target is None:
            raise ConfigError(
                f"strategy {self.name!r} makes records for one task, and the schema names none:"
                " set target = COLUMN in the schema, or take a method for all columns"
            )
        target = schema.index(schema.target)
        if schema.shape[target] > self.max_classes:
            raise ConfigError(
                f"target {schema.target!r} has {schema.shape[target]} cells, and {self.name!r}"
                f" predicts at most {self.max_classes}: cut it into fewer (num_bins), or raise"
                " max_classes"
            )
        if len(schema.columns) == 1:
            raise ConfigError(
                f"target {schema.target!r} is the only column, so nothing predicts it; take"
                " 'independent'"
            )
        return target

    def _noise(self, noise_multiplier: float) -> tuple[float, float, float]:
        """Noise multipliers of the features, the classifier as a whole, and each of its sums."""
        from ..core.accounting import split

        share = 0.0 if self.features == _UNIFORM else self.feature_share
        for_features = math.inf
        whole = noise_multiplier
        if share:
            for_features, whole = split(noise_multiplier, (share, 1 - share))
        return for_features, whole, split(whole, (1 / self.num_steps,) * self.num_steps)[0]

    def _features(
        self, apart: Schema, target: int, noise_multiplier: float, rng: np.random.Generator
    ) -> Steps:
        """The rounds of the features' method, under names of ours."""
        rounds = self._method().rounds(apart, noise_multiplier, rng)
        where = {"target": np.array([target], dtype=np.int64)}
        step = next(rounds)
        while True:
            if isinstance(step, Query):
                step = replace(step, name=_PREFIX + step.name, inputs={**step.inputs, **where})
            answer = yield step
            try:
                step = rounds.send(answer)
            except StopIteration as end:
                learned: Synthesizer = end.value
                return learned

    def _grids(self, schema: Schema, codes: NDArray[np.int32], target: int) -> list[Grid]:
        """Groups of each feature's cells, about equally heavy among synthetic records."""
        return [
            Grid(i, coarsen(_counts(codes[:, i], cells), self.max_groups))
            for i, cells in enumerate(schema.shape)
            if i != target
        ]

    def _shares(
        self, noisy: NoisySum, shape: tuple[int, ...], num_users: float
    ) -> NDArray[np.float64] | None:
        """Shares of the classes by the first sum, which clips no residual; `None`: in noise."""
        if not shape[1] or math.isinf(num_users):
            return None
        intercept = noisy.vector[:-1].reshape(shape)[-1] / num_users
        shares = contrasts(shape[1] + 1) @ intercept + 1 / (shape[1] + 1)
        least = min(noisy.stddev / num_users, 1 / (shape[1] + 1))
        return np.asarray(np.maximum(shares, least) / np.maximum(shares, least).sum())

    def _query(
        self,
        lookup: Lookup,
        weights: NDArray[np.float64],
        target: int,
        noise_multiplier: float,
        *,
        counts_users: bool,
    ) -> Query:
        """The query for the gradient at some weights, and for the number of users."""
        clip = self.clip_share * lookup.row_norm
        if counts_users:  # at zero weights no residual is longer than this
            clip = math.hypot(math.sqrt(1 - 1 / (weights.shape[1] + 1)) * lookup.row_norm, 1.0)
        return Query(
            _GRADIENT,
            dim=weights.size + counts_users,
            clip=clip * (1 + 2.0**-40),
            noise_multiplier=noise_multiplier,
            inputs={
                "target": np.array([target], dtype=np.int64),
                "weights": weights,
                "columns": lookup.columns,
                "starts": lookup.starts,
                "rows": lookup.rows,
            },
            cells=True,
        )


@dataclass(frozen=True)
class Guided(Synthesizer):
    """Features of one synthesizer, and a classifier of the target given them.

    Attributes:
      schema: Schema of the records.
      features: Makes all columns but the target.
      classifier: Gives the target's probabilities, also for records from elsewhere.
      mode: As `DpdSyn.mode`.
      sharpness: As `DpdSyn.sharpness`.
      num_moves: As `DpdSyn.num_moves`.
    """

    schema: Schema
    features: Synthesizer
    classifier: Softmax
    mode: Mode
    sharpness: float
    num_moves: int
    kind: ClassVar[str] = "guided"

    def sample(self, num_records: int, rng: np.random.Generator) -> Records:
        """Records whose target follows the classifier."""
        if self.mode == "accept":
            return Records(self._accepted(num_records, rng))
        codes = self._candidates(num_records, rng)
        target = self._target
        probs = self.classifier.probabilities(codes)
        if self.mode == "invert" and num_records:
            codes[:, target] = rng.choice(probs.shape[1], num_records, p=_mean(probs))
            self._invert(codes, rng)
        else:
            codes[:, target] = _drawn(probs, rng)
        return Records(codes)

    def soft_labels(self, records: Records) -> NDArray[np.float64]:
        """Probability of each of the target's cells, `(num_records, num_cells)`.

        Costs no privacy for synthetic or public records: the classifier is released.
        """
        return self.classifier.probabilities(records.codes)

    def settings(self) -> dict[str, Any]:
        """The mode, and the features' kind and settings."""
        return {
            "mode": self.mode,
            "sharpness": self.sharpness,
            "num_moves": self.num_moves,
            "features": {"kind": self.features.kind, "settings": self.features.settings()},
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The classifier's arrays, and the features' under names of their own."""
        lookup = self.classifier.lookup
        own = {
            "weights": self.classifier.weights,
            "columns": lookup.columns,
            "starts": lookup.starts,
            "rows": lookup.rows,
        }
        return own | {_PREFIX + key: value for key, value in self.features.tensors().items()}

    @classmethod
    def restore(
        cls, schema: Schema, settings: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
    ) -> Self:
        """The synthesizer that was saved.

        Raises:
          ConfigError: What was saved is not a `Guided` of this schema.
        """
        from .registry import synthesizer_class

        inner = settings.get("features")
        mode, sharpness = settings.get("mode"), settings.get("sharpness")
        moves = settings.get("num_moves")
        if not (
            schema.target is not None
            and isinstance(inner, Mapping)
            and isinstance(inner.get("kind"), str)
            and inner["kind"] != cls.kind
            and isinstance(inner.get("settings"), Mapping)
            and mode in ("label", "accept", "invert")
            and isinstance(sharpness, float)
            and math.isfinite(sharpness)
            and isinstance(moves, int)
        ):
            raise ConfigError("a saved guided synthesizer holds a mode and the features' settings")
        parts = {
            key.removeprefix(_PREFIX): value
            for key, value in tensors.items()
            if key.startswith(_PREFIX)
        }
        features = synthesizer_class(inner["kind"]).restore(
            features_of(schema), inner["settings"], parts
        )
        arrays = {key: value for key, value in tensors.items() if not key.startswith(_PREFIX)}
        classifier = _model_of(arrays, len(schema.columns))
        cells = [schema.shape[c] for c in classifier.lookup.columns.tolist()]
        target = schema.index(schema.target)
        if (
            classifier.num_classes != schema.shape[target]
            or target in classifier.lookup.columns
            or np.diff(classifier.lookup.starts).tolist() != cells
        ):
            raise ConfigError("a saved classifier that does not fit the schema")
        return cls(schema, features, classifier, mode, sharpness, moves)

    @property
    def _target(self) -> int:
        """Position of the target."""
        return self.schema.index(self.schema.target or "")

    def _candidates(self, num_records: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Codes of all columns, the target's all zero."""
        return with_target(self.features.sample(num_records, rng).codes, self._target)

    def _accepted(self, num_records: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Codes of candidates that their class, drawn apart, would have; see `mode`."""
        kept: list[NDArray[np.int32]] = []
        found = 0
        for batch in range(_BATCHES + 1):
            if found >= num_records and kept:
                break
            codes = self._candidates(max(num_records, 1), rng)
            probs = self.classifier.probabilities(codes)
            if batch < _BATCHES:
                classes = rng.choice(probs.shape[1], len(codes), p=_mean(probs))
                chance = probs[np.arange(len(codes)), classes] ** self.sharpness
                keep = rng.random(len(codes)) < chance
            else:
                classes, keep = _drawn(probs, rng), np.ones(len(codes), dtype=np.bool_)
            codes[:, self._target] = classes
            kept.append(codes[keep])
            found += int(keep.sum())
        return np.concatenate(kept)[:num_records]

    def _invert(self, codes: NDArray[np.int32], rng: np.random.Generator) -> None:
        """Move features, in place, to where the record's class is likeliest; see `mode`.

        Each move looks at one column of a random half of the records, and gives each the group
        of cells with the highest log probability of its class plus log share of the group.
        """
        lookup, weights = self.classifier.lookup, self.classifier.class_weights
        logits = self.classifier.logits(codes)
        classes = codes[:, self._target].astype(np.int64)
        for _ in range(self.num_moves):
            at = int(rng.integers(len(lookup.columns)))
            column = int(lookup.columns[at])
            rows = lookup.rows[lookup.starts[at] : lookup.starts[at + 1]]
            cells = np.bincount(codes[:, column], minlength=len(rows)) + 1e-9
            first = int(rows.min())
            inside = np.zeros((int(rows.max()) - first + 1, len(rows)))
            inside[rows - first, np.arange(len(rows))] = cells
            shares = np.log(inside.sum(axis=1) / len(codes))
            own = weights[first : first + len(inside)]
            moved = np.flatnonzero(rng.random(len(codes)) < 0.5)
            step = max(1, _BLOCK // own.size)
            for start in range(0, len(moved), step):
                part = moved[start : start + step]
                before = weights[rows[codes[part, column]]]
                each = (logits[part] - before)[:, None, :] + own  # (records, groups, classes)
                likely = np.take_along_axis(each, classes[part][:, None, None], axis=2)[:, :, 0]
                likely -= np.logaddexp.reduce(each, axis=2)
                best = (likely + shares).argmax(axis=1)
                codes[part, column] = spread(best, inside, rng)
                logits[part] += own[best] - before


def features_of(schema: Schema) -> Schema:
    """The schema of all columns but the target, with the constraints that do not name it."""
    target = schema.index(schema.target or "")
    columns = tuple(c for i, c in enumerate(schema.columns) if i != target)
    constraints = tuple(
        constraint
        for constraint, rule in zip(schema.constraints, schema.rules.single, strict=True)
        if target not in rule.columns
    )
    return replace(schema, columns=columns, target=None, constraints=constraints)


def with_target(codes: NDArray[np.int32], target: int) -> NDArray[np.int32]:
    """Codes of the features with a column of zeros where the target stands."""
    return np.insert(codes, target, 0, axis=1).astype(np.int32, copy=False)


def _counts(codes: NDArray[np.int32], num_cells: int) -> NDArray[np.float64]:
    """How often each cell stands among synthetic records; none is nil."""
    return np.asarray(np.bincount(codes, minlength=num_cells) + 1, dtype=np.float64)


def _mean(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The classes' mean probabilities."""
    mean = probs.mean(axis=0)
    return np.asarray(mean / mean.sum())


def _drawn(probs: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A class for each row of probabilities."""
    ends = np.cumsum(probs, axis=1)
    above = rng.random((len(probs), 1)) * ends[:, -1:] >= ends
    return np.asarray(np.minimum(above.sum(axis=1), probs.shape[1] - 1), dtype=np.int64)


def _checked_target(query: Query, num_columns: int) -> int:
    """The target's position that came with a query."""
    target = query.inputs.get("target", np.zeros(0))
    if target.shape != (1,) or target.dtype.kind != "i" or not 0 <= target[0] < num_columns:
        raise ConfigError(f"query {query.name!r} comes without the position of a target")
    return int(target[0])


def _checked_model(query: Query, num_columns: int) -> Softmax:
    """The classifier that came with a query, after checks that look at no record."""
    arrays = {key: value for key, value in query.inputs.items() if key != "target"}
    model = _model_of(arrays, num_columns)
    if query.dim - model.weights.size not in (0, 1):
        raise ConfigError(f"query {query.name!r} has another length than its weights")
    return model


def _model_of(arrays: Mapping[str, NDArray[Any]], num_columns: int) -> Softmax:
    """A classifier from plain arrays.

    Raises:
      ConfigError: They contradict each other or the number of columns.
    """
    names = ("columns", "starts", "rows", "weights")
    if set(arrays) != set(names):
        raise ConfigError(f"a classifier is made of exactly {', '.join(names)}")
    columns, starts, rows, weights = (arrays[name] for name in names)
    if not (
        all(a.ndim == 1 and a.dtype.kind == "i" for a in (columns, starts, rows))
        and weights.ndim == 2
        and weights.dtype.kind == "f"
        and np.isfinite(weights).all()
        and len(columns) == len(starts) - 1
        and starts[0] == 0
        and starts[-1] == len(rows)
        and (np.diff(starts) > 0).all()
        and ((columns >= 0) & (columns < num_columns)).all()
        and ((rows >= 0) & (rows < len(weights) - 1)).all()
    ):
        raise ConfigError("a classifier whose arrays contradict each other")
    lookup = Lookup(
        columns.astype(np.int64), starts.astype(np.int64), rows.astype(np.int64), len(weights)
    )
    return Softmax(lookup, weights.astype(np.float64))
