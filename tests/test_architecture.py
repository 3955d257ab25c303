# SPDX-License-Identifier: Apache-2.0
"""The house rules that code can check: floors, doors, and what is never used."""

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {
    "core": {"core"},
    "models": {"core", "models"},
    "strategies": {"core", "models", "strategies"},
    "client": {"core", "models", "strategies", "client"},
    "server": {"core", "models", "strategies", "server"},
    "simulation": {"core", "models", "strategies", "client", "server", "simulation"},
}
LIBRARY = sorted(p for folder in BELOW for p in (ROOT / folder).rglob("*.py"))
FILES = [p.relative_to(ROOT).as_posix() for p in LIBRARY]
FOREIGN_BYTES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
GLOBAL_RANDOM = {
    "seed", "rand", "randn", "randint", "random", "normal", "choice", "shuffle", "permutation",
    "uniform", "RandomState", "set_state", "get_state",
}  # fmt: skip
# Where everything is caught, and what it becomes: nothing is ever swallowed in silence.
EDGES = {
    "client/app.py": "a fixed code, for Flower would send the text of an exception to the server",
    "client/placing.py": "zeros for the record that makes an embedder fail",
    "client/respond.py": "zeros for the user whose records make a plug-in fail",
    "simulation/check.py": "the finding that a plug-in raised",
    "simulation/cli.py": "exit code 70, a bug",
    "simulation/local.py": "an error reply, as Flower's own engines give",
}
READS_RAW = {"models/frechet.py", "simulation/quality.py"}  # exact statistics of private records
WATCHES_GLOBAL_RANDOM = {
    "simulation/check.py",  # to see whether a plug-in touched it
    "strategies/parts/module.py",  # torch draws a module's first weights from it; put back after
}


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(file: str) -> Iterator[str]:
    """Absolute dotted names of all modules that a file imports, wherever in it."""
    package = ["fedsynth", *Path(file).parent.parts]
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def called(file: str) -> Iterator[str]:
    """Dotted names of what a file calls."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches everything."""
    if handler.type is None:
        return True
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(name) in ("Exception", "BaseException") for name in names)


def test_there_is_a_library_to_look_at():
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES)
def test_a_folder_imports_only_from_floors_below_it(file: str):
    floor = file.split("/")[0]

    ours = {name.split(".")[1] for name in imported(file) if name.startswith("fedsynth.")}

    assert ours & set(BELOW) <= BELOW[floor]


@pytest.mark.parametrize("file", FILES)
def test_ours_is_imported_relatively(file: str):
    absolute = [
        node
        for node in ast.walk(tree_of(file))
        if (isinstance(node, ast.Import) and any(a.name.startswith("fedsynth") for a in node.names))
        or (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] == "fedsynth"
        )
    ]

    assert absolute == []


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("simulation/")])
def test_exact_figures_of_raw_records_are_made_in_simulations_alone(file: str):
    exact = {f"fedsynth.{raw.removesuffix('.py').replace('/', '.')}" for raw in READS_RAW}

    assert not exact & set(imported(file))


@pytest.mark.parametrize("file", sorted(READS_RAW))
def test_what_reads_raw_records_is_marked(file: str):
    idea = ast.get_docstring(tree_of(file)) or ""

    assert "simulation" in idea
    assert re.search(r"never (leave|go)", idea) is not None


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("core/")])
def test_only_the_wire_knows_flower(file: str):
    flower = [name for name in imported(file) if name.split(".")[0] == "flwr"]

    assert not flower or file == "core/wire.py"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(("core/", "strategies/"))])
def test_methods_and_mathematics_know_no_runtime_no_clock_and_no_network(file: str):
    forbidden = {"time", "datetime", "socket", "urllib", "http", "requests", "httpx", "ray"}

    assert not {name.split(".")[0] for name in imported(file)} & forbidden


@pytest.mark.parametrize("file", FILES)
def test_no_file_prints_evaluates_or_executes(file: str):
    calls = set(called(file))

    assert not calls & {"print", "eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    assert not {"torch.save", "numpy.load", "yaml.load"} & calls


@pytest.mark.parametrize("file", FILES)
def test_no_file_reads_foreign_bytes_as_objects(file: str):
    assert not {name.split(".")[0] for name in imported(file)} & FOREIGN_BYTES
    for node in ast.walk(tree_of(file)):
        safe = {"np.load": ("allow_pickle", "False"), "torch.load": ("weights_only", "True")}
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in safe:
            key, value = safe[name]

            assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get(key) == value


@pytest.mark.parametrize("file", FILES)
def test_a_broad_except_stands_at_a_named_edge_only(file: str):
    broad = [
        node.lineno
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ExceptHandler) and swallows(node)
    ]

    assert len(broad) <= (file in EDGES)


@pytest.mark.parametrize("file", FILES)
def test_no_promise_rests_on_an_assert(file: str):
    asserts = [node.lineno for node in ast.walk(tree_of(file)) if isinstance(node, ast.Assert)]

    assert asserts == []


@pytest.mark.parametrize("file", [f for f in FILES if f not in WATCHES_GLOBAL_RANDOM])
def test_no_file_uses_global_random_state(file: str):
    calls = {c.removeprefix("numpy.").removeprefix("np.") for c in called(file)}

    assert not calls & {f"random.{name}" for name in GLOBAL_RANDOM}
    assert not any(c.startswith("torch.") and c.endswith("manual_seed") for c in calls)


@pytest.mark.parametrize("file", ["__init__.py", "__main__.py", "fedsynth.py", *FILES])
def test_a_file_opens_with_its_licence_and_its_one_idea(file: str):
    text = (ROOT / file).read_text(encoding="utf-8")

    idea = ast.get_docstring(ast.parse(text))

    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert idea is not None
    assert idea.splitlines()[0].rstrip().endswith(".")


@pytest.mark.parametrize("file", FILES)
def test_a_file_name_says_an_idea_and_not_a_drawer(file: str):
    assert Path(file).stem not in {"utils", "util", "helpers", "common", "manager", "misc", "base"}


def test_the_rules_can_fail():
    """Each rule above, on a line that breaks it."""
    broken = ast.parse("try:\n  pass\nexcept (ValueError, Exception):\n  pass\n")
    handler = next(n for n in ast.walk(broken) if isinstance(n, ast.ExceptHandler))

    assert swallows(handler)


def test_every_source_is_utf8():
    for file in FILES:
        with tokenize.open(ROOT / file) as source:
            assert source.encoding == "utf-8"
