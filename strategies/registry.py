# SPDX-License-Identifier: Apache-2.0
"""Find strategies, aggregators and synthesizers by name, and build them from settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..core.aggregator import Aggregator
from ..core.errors import ConfigError
from ..core.plugins import build, entry_names, find
from ..core.query import Strategy
from ..core.synthesizer import Synthesizer
from ..core.wire import canonical
from .discovered import Discovered
from .scored import Scored

_SCORE = [f.name for f in dataclasses.fields(Scored) if f.name.startswith("score_")]
_DOMAIN = [f.name for f in dataclasses.fields(Discovered) if f.name.startswith("domain_")]

STRATEGIES = {
    "independent": "strategies.independent:Independent",
    "marginals": "strategies.marginals:Marginals",
    "mst": "strategies.mst:Mst",
    "privsyn": "strategies.privsyn:Privsyn",
    "privmrf": "strategies.privmrf:PrivMrf",
    "aim": "strategies.aim:Aim",
    "mwem": "strategies.mwem:Mwem",
    "absyn": "strategies.absyn:Absyn",
    "flaim": "strategies.flaim:Flaim",
    "private_evolution": "strategies.private_evolution:PrivateEvolution",
    "pre_text": "strategies.pre_text:PreText",
    "tab_pe": "strategies.tab_pe:TabPe",
    "popri": "strategies.popri:Popri",
    "topics": "strategies.topics:Topics",
    "dp_merf": "strategies.dp_merf:DpMerf",
    "dp_fedavg": "strategies.dp_fedavg:DpFedAvg",
    "dp_fedavg_gan": "strategies.dp_fedavg_gan:DpFedAvgGan",
    "dp_diffusion": "strategies.dp_diffusion:DpDiffusion",
    "dp_lora": "strategies.dp_lora:DpLora",
    "dp_wgan": "strategies.dp_wgan:DpWgan",
    "rdp_gan": "strategies.rdp_gan:RdpGan",
    "relational": "strategies.relational:Relational",
    "dpdsyn": "strategies.dpdsyn:DpdSyn",
}
AGGREGATORS = {"sum": "core.aggregator:Sum"}
SYNTHESIZERS = {
    "columns": "strategies.independent:Columns",
    "tree": "strategies.mst:Tree",
    "edited": "strategies.privsyn:Edited",
    "graph": "strategies.parts.graph:Graph",
    "household": "strategies.relational:Household",
    "evolved": "strategies.tab_pe:Evolved",
    "pool": "strategies.parts.pool:Pool",
    "expanded": "strategies.parts.expanded:Expanded",
    "network": "strategies.parts.generator:Network",
    "autoencoder": "strategies.parts.autoencoder:Autoencoder",
    "diffusion": "strategies.parts.diffusion:Diffusion",
    "latent_gaussians": "strategies.parts.latent_gaussians:LatentGaussians",
    "guided": "strategies.dpdsyn:Guided",
    "language_texts": "strategies.parts.tuned_language:LanguageTexts",
}


def strategy_names() -> list[str]:
    """Names of all installed strategies."""
    return sorted({*STRATEGIES, *entry_names("fedsynth.strategies")})


def build_strategy(name: str, settings: Mapping[str, Any], *, is_open: bool = False) -> Strategy:
    """A strategy by its name, or by `module:Name`, with its settings checked.

    Args:
      name: Its name.
      settings: Its fields; those of `Discovered`, which begin with `domain_`, and of `Scored`,
        which begin with `score_`, among them.
      is_open: The schema has open columns, so that their domains are to be found first.

    Raises:
      ConfigError: No such strategy, an unknown key, or a value of the wrong type or range.
    """
    kind = find("strategy", name, STRATEGIES, "fedsynth.strategies", Strategy)  # type: ignore[type-abstract]
    return built(kind, settings, f"strategy {name!r}", is_open=is_open)


def built(
    kind: type[Strategy], settings: Mapping[str, Any], where: str, *, is_open: bool
) -> Strategy:
    """A strategy of a class, as `build_strategy` makes it."""
    if not is_open:
        fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for key in settings:
            if key in _DOMAIN and key not in fields:
                raise ConfigError(
                    f"{where}: unknown key {key!r}: it is for schemas with open columns (categories"
                    ' or bounds = "private"), and here there are none; leave it out'
                )
        return _scored(kind, settings, where)
    own = {key: value for key, value in settings.items() if not key.startswith("domain_")}
    domain = {key: value for key, value in settings.items() if key.startswith("domain_")}
    return build(Discovered, {"inner": _scored(kind, own, where), **domain}, where)


def _scored(kind: type[Strategy], settings: Mapping[str, Any], where: str) -> Strategy:
    """A strategy of a class; where its settings share a budget with a score, with that."""
    fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    score = {key: settings[key] for key in _SCORE if key in settings and key not in fields}
    if "score_share" not in score:
        return build(kind, settings, where)
    own = {key: value for key, value in settings.items() if key not in score}
    return build(Scored, {"inner": build(kind, own, where), **score}, where)


def build_aggregator(name: str, settings: Mapping[str, Any]) -> Aggregator:
    """An aggregator by its name, or by `module:Name`, with its settings checked.

    Raises:
      ConfigError: No such aggregator, an unknown key, or a value of the wrong type or range.
    """
    group = "fedsynth.aggregators"
    kind = find("aggregator", name, AGGREGATORS, group, Aggregator)  # type: ignore[type-abstract]
    return build(kind, settings, f"aggregator {name!r}")


def settings_of(strategy: Strategy) -> str:
    """A strategy's settings as canonical JSON; `build_strategy` reads them back."""
    settings = dataclasses.asdict(strategy)  # type: ignore[call-overload]
    while isinstance(strategy, Discovered | Scored):
        settings |= settings.pop("inner")
        strategy = strategy.inner
    return canonical(settings)


def synthesizer_class(kind: str) -> type[Synthesizer]:
    """The class that a saved synthesizer is restored by.

    Never imports a module that a file names: a plug-in's kinds are found by entry point only.
    """
    if ":" in kind:
        raise ConfigError(f"synthesizer kind {kind!r} must be installed as an entry point")
    group = "fedsynth.synthesizers"
    return find("synthesizer", kind, SYNTHESIZERS, group, Synthesizer)  # type: ignore[type-abstract]
