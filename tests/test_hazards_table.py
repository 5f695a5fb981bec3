"""The table of hazards is complete, and names tests that there are."""

import ast
import pathlib
from types import SimpleNamespace

from hazards import HAZARDS, Hazard, summary_lines

TESTS = pathlib.Path(__file__).parent


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}


def test_all_47_cases_have_one_row():
    assert [hazard.number for hazard in HAZARDS] == list(range(1, 48))
    assert all(hazard.tests and hazard.outcome for hazard in HAZARDS)
    assert max(len(hazard.outcome) for hazard in HAZARDS) <= 88


def test_every_named_test_exists():
    files = {f"tests/{path.name}": functions(path) for path in TESTS.glob("test_*.py")}
    missing = []
    for hazard in HAZARDS:
        for name in hazard.node_ids():
            file, function = name.split("::")
            if function not in files.get(file, set()):
                missing.append((hazard.number, name))
    assert missing == []


def test_every_test_of_hazards_is_in_the_table():
    named = {name for hazard in HAZARDS for name in hazard.node_ids()}
    files = [
        path for path in TESTS.glob("test_hazards_*.py") if path.name != "test_hazards_table.py"
    ]
    written = {
        f"tests/{path.name}::{name}"
        for path in files
        for name in functions(path)
        if name.startswith("test_")
    }
    assert files and written <= named, written - named


def test_the_printed_table_counts_what_ran():
    rows = (
        Hazard(1, "one", ("a::x", "a::y")),
        Hazard(2, "two", ("a::y",), exception="dense"),
        Hazard(3, "three", ("b::z",)),
    )
    report = lambda name: SimpleNamespace(nodeid=f"tests/test_a.py::test_{name}")  # noqa: E731
    reports = {"passed": [report("x[1]"), report("x[2]"), report("y")], "failed": []}
    assert summary_lines(rows, reports) == [
        " 1  passed    3 tests  one",
        " 2  passed    1 tests  two [not: dense]",
        "2 of 2 hazards passed",
    ]
    reports["error"] = [report("y")]
    assert [line[4:10] for line in summary_lines(rows, reports)[:2]] == ["FAILED", "FAILED"]
    assert summary_lines(rows, {"passed": []}) == []
