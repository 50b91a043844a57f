"""Imports point left only, extras are imported where they are used, and the first import is cheap."""

import ast
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import isotach

PACKAGE = Path(isotach.__file__).parent
REPOSITORY = PACKAGE.parent

# Left to right; a room may import itself and what stands before it.
ROOMS = (
    "errors", "files", "allocator", "shapes", "rng", "config", "ops", "nn", "mixers", "models", "data", "parallel",
    "infer", "train", "eval", "testing", "linearize", "search", "serve", "bench", "cli",
)  # fmt: skip
EXTRAS = ("datasets", "fastapi", "lm_eval", "matplotlib", "pandas", "pyarrow", "tensorboard", "transformers", "triton")

KERNELS = "isotach.ops.triton."  # imported where triton is, and nowhere else


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the package, its own `__init__` left out."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name != "isotach":
            yield name, path


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every dotted name that a module imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: everything but the insides of functions and of `if TYPE_CHECKING`."""
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in node.orelse if typing_only else ast.iter_child_nodes(node):
        yield from at_import_time(child)


def faults(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module called `name`."""
    tree = ast.parse(source)
    room = name.split(".")[1]
    found = []
    for node, target in imported(tree):
        parts = target.split(".")
        where = f"{name}:{node.lineno} imports {target}"
        if parts[0] == "typer" and room != "cli":
            found.append(f"{where}: the command line belongs to isotach.cli")
        if parts[0] != "isotach":
            continue
        if len(parts) > 1 and parts[1] in ROOMS:
            if ROOMS.index(parts[1]) > ROOMS.index(room):
                found.append(f"{where}: imports point left only, and {parts[1]} stands right of {room}")
            if room == "mixers" and parts[1] == "mixers" and len(parts) > 2:
                found.append(f"{where}: mixers do not import each other")
        elif target != "isotach.__version__":
            found.append(f"{where}: name the module that defines it")
    eager = {id(node) for node in at_import_time(tree)}
    found += [
        f"{name}:{node.lineno} imports {target}: import extras inside the function that needs them"
        for node, target in imported(tree)
        if target.split(".")[0] in EXTRAS and id(node) in eager
        if not (target.split(".")[0] == "triton" and name.startswith(KERNELS))
    ]
    return found


def test_imports_point_left_only() -> None:
    assert [fault for name, path in modules() for fault in faults(name, path.read_text(encoding="utf-8"))] == []


def test_every_room_is_known() -> None:
    assert {name.split(".")[1] for name, _ in modules()} <= set(ROOMS)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("isotach.ops.decay", "from isotach.nn import norm"),
        ("isotach.ops.decay", "def f():\n    import isotach.models.decoder"),
        ("isotach.mixers.gla", "from isotach.mixers.lightning import Lightning"),
        ("isotach.mixers.gla", "from isotach.mixers import lightning"),
        ("isotach.data.stream", "import pyarrow.parquet"),
        ("isotach.ops.decay", "import triton.language"),
        ("isotach.ops.triton.decay", "import transformers"),
        ("isotach.data.stream", "if True:\n    try:\n        import datasets\n    except ImportError:\n        raise"),
        ("isotach.data.stream", "class Parquet:\n    import pyarrow"),
        ("isotach.train.loop", "import typer"),
        ("isotach.infer.sample", "from isotach import Decoder"),
    ],
)
def test_a_planted_fault_is_found(name: str, source: str) -> None:
    assert faults(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("isotach.mixers.gla", "from isotach.ops.decay import Decay\nfrom isotach.nn.mixer import Mixer"),
        ("isotach.data.stream", "def parquet():\n    import pyarrow.parquet"),
        ("isotach.data.stream", "class Parquet:\n    def read(self):\n        import pyarrow"),
        ("isotach.train.loop", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("isotach.cli", "from isotach import __version__\nimport typer"),
        ("isotach.ops.decay", "from isotach import shapes"),
        ("isotach.ops.triton.decay", "import triton"),
    ],
)
def test_a_good_import_passes(name: str, source: str) -> None:
    assert not faults(name, source)


def python(code: str) -> float:
    """Seconds that a fresh interpreter takes to run `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
    return time.perf_counter() - start


def test_the_front_door_does_not_import_torch() -> None:
    verbs = [f"isotach.cli.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE / "cli")])]
    heavy = ("torch", "numpy", "transformers", "tokenizers", "pyarrow", "matplotlib")
    python(
        f"import sys, importlib\n"
        f"for name in {['isotach', 'isotach.cli', *verbs]}:\n"
        f"    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {heavy} if heavy in sys.modules]\n"
        f"    assert not loaded, f'{{name}} imports {{loaded}}'"
    )


def test_public_names_resolve() -> None:
    assert set(isotach.__all__) == set(isotach._HOME)
    for name in isotach.__all__:
        assert getattr(isotach, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'decoder_'"):
        _ = isotach.decoder_


def test_importing_isotach_costs_little_beside_torch() -> None:
    """Pairs of fresh interpreters, one after the other, so that a slow machine slows both."""
    ratios = [python("import isotach") / python("import torch") for _ in range(3)]
    assert statistics.median(ratios) <= 1.2


def test_help_is_fast() -> None:
    """`isotach --help` under 0.5 s, in processor time so that neighbours do not count."""
    before = os.times()
    code = "import sys; from isotach.cli import main; sys.exit(main(['--help']))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    assert spent < 0.5, f"isotach --help took {spent:.2f} s of processor time"
