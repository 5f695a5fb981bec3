"""The rules of the house that a program can check: imports, sizes and hazards.

`test_docstrings.py` checks the docstrings.
"""

import ast
import graphlib
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
HAZARDS = 47

# A module imports only modules of a lower rank, or of its own package.
RANKS = (
    (
        "_checks",
        "_compiled",
        "_functions",
        "_initial",
        "_text",
        "_mesh",
        "_memory",
        "_atomic_file",
        "_balanced_table",
        "_scoring",
    ),
    ("_matmul", "_families"),
    ("_routing", "_config_file", "_experts", "hash_tables", "matmul"),
    ("_config", "_balance", "_loss_moments"),
    ("_balance_losses", "_sign_bias"),
    ("_quantile_bias",),
    ("_router",),
    ("_dispatch", "_replay", "_filters"),
    ("_moe", "_bias_update"),
    ("_common", "_upcycle", "_muon"),
    ("_parallel", "_checkpoint", "_inspect"),
    ("training", "exchange"),
    ("__init__",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def module_name(path, source=SOURCE):
    """`braidax._router.base` for that file, `braidax._router` for the `__init__` of the package."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(["braidax", *parts]).removesuffix(".__init__")


def top_module(name):
    """The module or package directly below `braidax`; the root itself is `__init__`."""
    return (name.split(".") + ["__init__"])[1]


def imported_names(code, package):
    """The dotted names that code imports, also below a function or an `if TYPE_CHECKING`. Relative
    names are resolved against `package`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = [*parts, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def import_graph(source=SOURCE):
    """`{module: the modules of this library that its file imports}`."""
    paths = {module_name(path, source): path for path in source.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for imported in imported_names(path.read_text(), package):
            while imported and imported not in paths:  # the name of an object in a module
                imported = imported.rpartition(".")[0]
            graph[name] |= {imported} - {"", name}
    return graph


def test_no_circle_of_imports():
    tuple(graphlib.TopologicalSorter(import_graph()).static_order())  # CycleError names the files


def test_imports_point_one_way():
    graph = import_graph()
    assert {top_module(name) for name in graph} <= RANK.keys(), "give it a place in RANKS"
    pairs = {(top_module(name), top_module(i)) for name, found in graph.items() for i in found}
    assert {(a, b) for a, b in pairs if a != b and RANK[a] <= RANK[b]} == set()


@pytest.mark.parametrize(
    "code",
    [
        "from .hash import table",
        "from . import hash",
        "import braidax._router.hash as h, jax",
        "def f():\n    from braidax._router.hash import table",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .._router.hash import table",
    ],
)
def test_a_circle_of_two_files_of_a_package_is_seen(tmp_path, code):
    package = tmp_path / "_router"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "base.py").write_text(code)
    (package / "hash.py").write_text("from .. import _router\nfrom .base import Router")
    graph = import_graph(tmp_path)
    assert graph["braidax._router.base"] >= {"braidax._router.hash"}
    assert graph["braidax._router.hash"] == {"braidax._router", "braidax._router.base"}
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(graph).static_order())


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {re.split(r"[<>=!~\[ ]", line)[0] for line in requirements}
    distributions = importlib.metadata.packages_distributions()
    # Relative names are of the library, however deep the package.
    used = {name for path in FILES for name in imported_names(path.read_text(), "braidax._._")}
    used = {name.split(".")[0] for name in used} - {"braidax", *sys.stdlib_module_names}
    assert {distributions[name][0] for name in used} <= declared


def test_files_and_functions_are_short():
    long = {}
    for path in FILES:
        code, name = path.read_text(), path.relative_to(SOURCE)
        long[str(name)] = len(code.splitlines()) - LONGEST_FILE
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                long[f"{name}:{node.name}"] = length - LONGEST_FUNCTION
    assert {name: excess for name, excess in long.items() if excess > 0} == {}


def test_every_hazard_has_a_test_and_one_outcome():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    marks = re.findall(r"^@pytest\.mark\.hazard\(\s*(\d+)(,\s*\")?", code, re.MULTILINE)
    numbers = list(range(1, HAZARDS + 1))
    assert sorted({int(number) for number, _ in marks}) == numbers
    assert sorted(int(number) for number, outcome in marks if outcome) == numbers
