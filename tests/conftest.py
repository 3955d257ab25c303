# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders share."""

import importlib
import os
import sys
from pathlib import Path

import pytest

FOLDER = str(Path(__file__).resolve().parent.parent / "benchmarks")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


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
