"""The rules of the house that a program can check: imports and sizes (`test_docstrings.py`: the
docstrings)."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / "src" / "braidax"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST_FILE = 250
LONGEST_FUNCTION = 70

# A module imports only modules of a lower rank, or of its own package.
RANKS = (
    ("_checks", "_balanced_table"),
    ("_config_file",),
    ("_routing", "_scoring", "_config", "hash_tables"),
    ("_mesh",),
    ("_balance", "_balance_losses", "_experts", "_dispatch"),
    ("_router",),
    ("_backends", "_replay"),
    ("_moe",),
    ("_parallel", "_checkpoint"),
    ("_inspect",),
    ("_training",),
    ("_bench",),
    ("__init__",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def top_module(path):
    """The module or package directly below `braidax` that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(tree, package):
    """`(line, dotted name)` of everything imported, relative imports resolved against `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def our_imports(path):
    """`(line, top module)` of what a file imports from braidax; the root itself is `__init__`."""
    package = ["braidax", *path.relative_to(SOURCE).parts[:-1]]
    for line, name in imported_modules(ast.parse(path.read_text()), package):
        parts = name.split(".")
        if parts[0] == "braidax":
            yield line, parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


def wrong_imports(path):
    """The imports of a file that do not point down."""
    importer = top_module(path)
    return [
        f"{path.relative_to(SOURCE)}:{line} imports {imported}"
        for line, imported in our_imports(path)
        if imported != importer and RANK[imported] >= RANK[importer]
    ]


def test_every_module_has_a_rank():
    unranked = {top_module(path) for path in FILES} - set(RANK)
    assert not unranked, f"give {sorted(unranked)} a place in RANKS"


def test_imports_point_one_way():
    assert [wrong for path in FILES for wrong in wrong_imports(path)] == []


@pytest.mark.parametrize(
    "file, code, imported",
    [
        ("_balance.py", "from ._router import TopKRouter", ["_router"]),
        ("_balance.py", "def f():\n    from . import _router", ["_router"]),
        ("_router/top_k.py", "from .._balance import updated_bias", ["_balance"]),
        ("_router/top_k.py", "from .base import AbstractRouter", ["_router"]),
        ("_router/top_k.py", "from .. import hash_tables", ["hash_tables"]),
        ("_router/top_k.py", "import braidax._moe as moe, jax", ["_moe"]),
        ("_training/loop.py", "import braidax as bx", ["__init__"]),
        ("_training/loop.py", "from braidax import RoutedMoE", ["__init__"]),
    ],
)
def test_imports_are_read_from_the_code(monkeypatch, tmp_path, file, code, imported):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    assert [name for _, name in our_imports(path)] == imported
    allowed = [RANK[name] < RANK[top_module(path)] or name == top_module(path) for name in imported]
    assert (wrong_imports(path) == []) == all(allowed)


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {re.split(r"[<>=!~\[ ]", line)[0] for line in requirements}
    distributions = importlib.metadata.packages_distributions()
    used = set()
    for path in FILES:
        package = ["braidax", *path.relative_to(SOURCE).parts[:-1]]
        names = imported_modules(ast.parse(path.read_text()), package)
        used |= {name.split(".")[0] for _, name in names}
    used -= {"braidax", *sys.stdlib_module_names}
    assert {distributions[name][0] for name in used} <= declared


def test_files_are_short():
    lengths = {path.relative_to(SOURCE): len(path.read_text().splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_are_short():
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long[f"{path.relative_to(SOURCE)}:{node.name}"] = length
    assert long == {}
