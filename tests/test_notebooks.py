"""What `nox -s notebooks` calls equal, and that the stored notebooks are fit to be shown."""

import importlib.util
import json
import pathlib
import re

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
STORED = sorted(NOTEBOOKS.glob("*.ipynb"))
spec = importlib.util.spec_from_file_location("compare", NOTEBOOKS / "compare.py")
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)


def notebook(*outputs, tags=()):
    """A notebook of one cell that printed a text, or displayed a dictionary."""
    kinds = {str: "stream", dict: "display_data"}
    found = [
        {"output_type": kinds[type(output)], "name": "stdout", "text": output, "data": output}
        for output in outputs
    ]
    return {"cells": [{"metadata": {"tags": list(tags)}, "outputs": found}]}


EQUAL = (
    ("load 12 of 48", "load 12 of 48"),
    ("loss 1.2345", "loss 1.2346"),  # one unit of the last digit
    ("loss 0.2", "loss 0.3"),
    ("loss 1234.5678", "loss 1234.0000"),  # below 1e-3
    ("bytes 25,165.8 a token", "bytes 25,170.1 a token"),
    ("error 2.4e-07", "error 2.5e-07"),
    ("-0.0000 x", "0.0000 x"),
    ("  value\n-------\n  9.999", "   value\n--------\n  10.000"),  # the columns move
)
DIFFERENT = (
    ("load 12 of 48", "load 13 of 48"),
    ("load 100000", "load 100001"),  # an integer has no tolerance
    ("a hash router", "a top-k router"),
    ("loss 1.2345", "loss 1.2369"),
    ("loss 1.2", "loss 1"),
    ("error 2.4e-07", "error 2.4e-06"),
    ("1.5", "-1.5"),
    ("loss nan", "loss 1.0"),
    ("jax 0.10.2", "jax 0.10.3"),  # a version is no float
    ("layer e1.5", "layer e1.6"),
    ("1.0 2.0", "1.0"),
)


@pytest.mark.parametrize(("stored", "new"), [*EQUAL, *DIFFERENT])
def test_rounding_is_no_difference_and_another_number_or_word_is(stored, new):
    equal = (stored, new) in EQUAL
    for one, other in ((stored, new), (new, stored)):
        assert bool(compare.differences(notebook(one), notebook(other))) != equal
        # A cell with the tag shows what differs between machines.
        machine = notebook(one, tags=["machine"])
        assert compare.differences(machine, notebook(other)) == []


def test_outputs_are_compared_by_kind_and_text():
    figure, report = {"image/png": "AA", "text/plain": "<Figure>"}, {"text/plain": "load 12"}
    pixels, wider = {**figure, "image/png": "BB"}, {**figure, "text/plain": "<Wide figure>"}
    pieces = notebook("load", " 12")
    assert compare.differences(notebook(figure), notebook(pixels)) == []
    assert compare.differences(notebook("load 12"), pieces) == []
    different = [notebook(*outputs) for outputs in ((), (figure,), (wider,), (report,), ("1",))]
    for i, one in enumerate(different):
        for j, other in enumerate(different):
            assert len(compare.differences(one, other)) == (i != j)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_notebook_is_fit_to_be_shown(path):
    assert path.stat().st_size < 400_000
    cells = json.loads(path.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    # The order of a fresh kernel, without gaps: the outputs are of one run, top to bottom.
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    # The first cell says what the question is and how long it takes.
    first = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown" and "?" in first
    assert re.search(r"\b(second|minute)s?\b", first)
    assert path.with_suffix(".py").is_file()
