# SPDX-License-Identifier: Apache-2.0
"""What is installed is the whole package and nothing else, and importing it is light."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("client", "core", "models", "server", "simulation", "strategies")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = {
    "alembic",
    "dp_accounting",
    "fastapi",
    "flwr",
    "grpc",
    "jinja2",
    "numpy",
    "opacus",
    "pandas",
    "pyarrow",
    "pydantic",
    "ray",
    "scipy",
    "sklearn",
    "torch",
}


def modules() -> set[str]:
    """Every module of the package, as a path below it."""
    found = {p.relative_to(ROOT).as_posix() for f in FOLDERS for p in (ROOT / f).rglob("*.py")}
    return found | {"__init__.py", "__main__.py"}


def sources(folder: Path) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the checkout."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed"):
        shutil.copy(ROOT / name, folder)
    for name in ("__init__.py", "__main__.py", "fedsynth.py"):
        shutil.copy(ROOT / name, folder)
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that is built from the sources, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, "--wheel-dir", str(folder), str(sources(folder / "sources"))],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_list_of_packages_names_every_folder_with_code():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])

    folders = {Path(module).parent.as_posix() for module in modules()} - {"."}

    assert listed == {"fedsynth"} | {f"fedsynth.{f.replace('/', '.')}" for f in folders}


def test_every_folder_with_code_is_a_package():
    missing = [m for m in modules() if not (ROOT / m).parent.joinpath("__init__.py").exists()]

    assert missing == []


def test_the_wheel_holds_every_module(wheel_names: set[str]):
    assert {f"fedsynth/{module}" for module in modules()} <= wheel_names


def test_the_wheel_holds_its_types_templates_weights_and_licence(wheel_names: set[str]):
    data = [*ROOT.glob("core/*.j2"), *ROOT.glob("models/*.safetensors")]

    assert {f"fedsynth/{p.relative_to(ROOT).as_posix()}" for p in data} <= wheel_names
    assert {"fedsynth/py.typed", "fedsynth/models/glyphs.safetensors"} <= wheel_names
    assert any(name.endswith("/LICENSE") for name in wheel_names)


def test_the_wheel_holds_nothing_outside_the_package(wheel_names: set[str]):
    top = {name.split("/")[0] for name in wheel_names}

    assert top == {"fedsynth", f"fedsynth-{PYPROJECT['project']['version']}.dist-info"}
    assert not any(name.startswith(("fedsynth/tests/", "fedsynth/build/")) for name in wheel_names)


def test_the_version_is_stated_once_in_each_place_and_agrees():
    import fedsynth

    assert fedsynth.__version__ == PYPROJECT["project"]["version"]


def test_the_base_install_needs_no_training_framework():
    names = {d.split(">")[0].split("=")[0] for d in PYPROJECT["project"]["dependencies"]}

    assert not names & {"torch", "opacus", "ray", "transformers", "scikit-learn", "pandas"}


def test_every_requirement_has_a_tested_version():
    pins = [
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = [*PYPROJECT["project"]["dependencies"], *extras["train"], *extras["dev"]]

    names = {d.split("[")[0].split(">")[0].split("=")[0].lower() for d in wanted}

    assert names <= set(pins)
    assert len(pins) == len(set(pins))


def test_nothing_installed_names_a_registry_host():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")

        assert "index-url" not in text
        assert "find-links" not in text


def test_flower_finds_both_components_where_the_metadata_says():
    components = PYPROJECT["tool"]["flwr"]["app"]["components"]

    for reference in components.values():
        module, attribute = reference.split(":")
        path = ROOT / (module.removeprefix("fedsynth.").replace(".", "/") + ".py")

        assert f"\n{attribute} = " in path.read_text(encoding="utf-8")
    assert PYPROJECT["tool"]["flwr"]["app"]["fab-include"] == ["/README.md"]


@pytest.mark.parametrize("module", ["fedsynth", "fedsynth.simulation.cli"])
def test_importing_it_loads_nothing_heavy(module: str):
    program = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"

    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert not set(run.stdout.split()) & HEAVY


def test_a_checkout_is_a_command_by_its_name():
    run = subprocess.run(
        [sys.executable, "-m", "fedsynth", "--version"], cwd=ROOT, capture_output=True, text=True
    )

    assert (run.returncode, run.stdout.strip()) == (0, PYPROJECT["project"]["version"])


def test_an_installed_package_is_a_command_by_its_name(tmp_path: Path):
    package = tmp_path / "fedsynth"
    shutil.copytree(sources(tmp_path / "sources"), package)
    (package / "fedsynth.py").unlink()

    run = subprocess.run(
        [sys.executable, "-m", "fedsynth", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert (run.returncode, run.stdout.strip()) == (0, PYPROJECT["project"]["version"])
