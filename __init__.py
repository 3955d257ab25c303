# SPDX-License-Identifier: Apache-2.0
"""fedsynth: federated, differentially private synthetic data with a bill anyone can check."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and where they live; imported when first used, so that `import fedsynth` is light.
_FACE = {
    "Budget": "core.privacy",
    "NoisePlacement": "core.privacy",
    "PrivacyUnit": "core.privacy",
    "User": "core.privacy",
    "Schema": "core.schema",
    "Strategy": "core.query",
    "Query": "core.query",
    "Contribution": "core.query",
    "NoisySum": "core.query",
    "Synthesizer": "core.synthesizer",
    "Release": "server.release",
    "simulate": "simulation.run",
    "FedsynthError": "core.errors",
}

__all__ = ["__version__", *_FACE]


def __getattr__(name: str) -> Any:
    """A public name, imported on first use."""
    if name not in _FACE:
        raise AttributeError(f"module 'fedsynth' has no attribute {name!r}")
    return getattr(import_module(f"fedsynth.{_FACE[name]}"), name)
