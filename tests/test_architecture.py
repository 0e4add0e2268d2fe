"""The shape of the house: import arrows, optional dependencies, lazy imports, file sizes, the wheel."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("refimpl", "cuda_backend", "memsim", "cli")
MAY_IMPORT = {
    "refimpl": {"refimpl", "numpy", "scipy"},
    "cuda_backend": {"refimpl", "cuda_backend", "numpy", "numba", "llvmlite", "cuda"},
    "memsim": {"refimpl", "memsim", "numpy", "scipy", "numba"},
    "cli": {"refimpl", "cuda_backend", "memsim", "cli", "numpy", "scipy", "click", "rich", "matplotlib"},
}
# The files that may name each optional dependency: one for each thing that is done with it.
DOORS: dict[str, str | tuple[str, ...]] = {
    "safetensors": "refimpl/checkpoint.py",
    "tokenizers": "refimpl/checkpoint.py",
    "mpi4py": "refimpl/parallel/mpi.py",
    "transformers": ("cli/transformers_model.py", "cuda_backend/transformers_attention.py"),
    "ml_dtypes": "refimpl/testing.py",
    "torch": (
        "cuda_backend/torch_layers.py",
        "cuda_backend/torch_modules.py",
        "cuda_backend/torch_ops.py",
        "cuda_backend/torch_rivals.py",
        "cuda_backend/torch_weight_only.py",
    ),
    "numba.cuda": "cuda_backend/_numba.py",
}
LONGEST = 400


def _sources(package: str) -> Iterator[Path]:
    yield from sorted((ROOT / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_never_run_back(package: str) -> None:
    for path in _sources(package):
        for name in _imports(path):
            top = name.partition(".")[0]
            optional = {door.partition(".")[0] for door in DOORS}
            allowed = top in MAY_IMPORT[package] or top in sys.stdlib_module_names or top in optional
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_optional_dependencies_have_one_door(package: str) -> None:
    for path in _sources(package):
        place = path.relative_to(ROOT).as_posix()
        for name in _imports(path):
            for dependency, door in DOORS.items():
                if name == dependency or name.startswith(f"{dependency}."):
                    assert place in ((door,) if isinstance(door, str) else door), (
                        f"{place} names {dependency}"
                    )


def test_optional_dependencies_are_imported_lazily() -> None:
    doors = {place for door in DOORS.values() for place in ((door,) if isinstance(door, str) else door)}
    for door in doors - {"cuda_backend/_numba.py"}:
        if not (ROOT / door).exists():
            continue
        tree = ast.parse((ROOT / door).read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in names} & {key.partition(".")[0] for key in DOORS}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("refimpl", ("numba", "scipy", "torch", "refimpl.attention")),
        ("memsim", ("numba", "scipy", "torch")),
        ("cuda_backend", ("numba", "scipy", "torch")),
        ("cli.main", ("numba", "scipy", "torch", "numpy", "rich")),
        ("refimpl.catalog", ("numba", "scipy", "torch")),
    ],
)
def test_imports_stay_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_files_are_readable_in_one_sitting(package: str) -> None:
    for path in _sources(package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_module_is_called_utils() -> None:
    for package in PACKAGES:
        for path in _sources(package):
            assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path


def test_callers_never_meet_an_assert() -> None:
    for package in PACKAGES:
        for path in _sources(package):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
            assert not asserts, f"{path.relative_to(ROOT)} asserts on lines {asserts}"


def test_the_wheel_holds_exactly_the_four_packages(tmp_path: Path) -> None:
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs build and hatchling")
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("tests", ".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, ignore=skip)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        sources = {path.relative_to(ROOT).as_posix() for path in _sources(package)}
        assert sources <= set(names)
    assert any(name.startswith("memsim/data/hardware/") for name in names)
    assert not (ROOT / "cli/__init__.py").read_text(encoding="utf-8").strip()
