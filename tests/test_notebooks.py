"""What `nox -s notebooks` calls equal, and that the stored notebooks are fit to be shown.

No kernel runs here: notebooks are small dictionaries, or the stored files.
"""

import json
import pathlib
import re
import sys

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
STORED = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(NOTEBOOKS)
    monkeypatch.delitem(sys.modules, "compare", raising=False)
    import compare

    yield compare
    monkeypatch.delitem(sys.modules, "compare")


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def displayed(**data):
    names = {"plain": "text/plain", "png": "image/png", "html": "text/html"}
    data = {names[kind]: value for kind, value in data.items()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def code(*outputs, source="x", tags=()):
    metadata = {"tags": list(tags)} if tags else {}
    cell = {"cell_type": "code", "source": source, "metadata": metadata, "outputs": list(outputs)}
    return {"cells": [{"cell_type": "markdown", "source": "text", "metadata": {}}, cell]}


@pytest.mark.parametrize(
    "stored, new",
    [
        ("load 12 of 48", "load 12 of 48"),
        ("loss 1.2345", "loss 1.2346"),  # one unit of the last digit
        ("loss 0.2", "loss 0.3"),
        ("loss 1234.5678", "loss 1234.0000"),  # below 1e-3
        ("bytes 25,165.8 a token", "bytes 25,170.1 a token"),
        ("error 2.4e-07", "error 2.5e-07"),
        ("error 2e-07", "error 3e-07"),
        ("-0.0000 x", "0.0000 x"),
        ("9.999  10", "10.000  10"),  # another width, and the columns move
        ("  value\n-------\n  9.999", "   value\n--------\n  10.000"),
        ("a  b \n\n", "a b"),
    ],
)
def test_rounding_and_alignment_are_no_difference(compare, stored, new):
    assert compare.text_difference(stored, new) is None
    assert compare.text_difference(new, stored) is None


@pytest.mark.parametrize(
    "stored, new",
    [
        ("load 12 of 48", "load 13 of 48"),
        ("load 100000", "load 100001"),  # an integer has no tolerance
        ("a hash router", "a top-k router"),
        ("loss 1.2345", "loss 1.2369"),
        ("loss 0.2", "loss 0.4"),
        ("loss 1.2", "loss 1"),
        ("error 2.4e-07", "error 2.6e-07"),
        ("error 2.4e-07", "error 2.4e-06"),
        ("0.0000", "0.0002"),
        ("1.5", "-1.5"),
        ("loss nan", "loss 1.0"),
        ("jax 0.10.2", "jax 0.10.3"),  # a version is no float
        ("layer e1.5", "layer e1.6"),
        ("1.0 2.0", "1.0"),
        ("one\ntwo", "one"),
        ("", "one"),
    ],
)
def test_other_numbers_and_words_are_differences(compare, stored, new):
    assert compare.text_difference(stored, new) is not None
    assert compare.text_difference(new, stored) is not None


def test_a_difference_names_cell_and_line(compare):
    stored, new = code(printed("same\nload 12")), code(printed("same\nload 13"))
    assert compare.output_differences(stored, new) == [
        "code cell 1: stored 'load 12', now 'load 13'"
    ]
    assert compare.output_differences(stored, stored) == []


def test_pieces_of_printed_text_are_joined_and_standard_error_is_left_out(compare):
    stored = code(printed("one\ntwo\n"))
    new = code(printed("one\n"), printed("a warning", "stderr"), printed(["two", "\n"]))
    assert compare.output_differences(stored, new) == []


def machine(*outputs):
    return code(*outputs, tags=["machine"])


@pytest.mark.parametrize(
    "stored, new",
    [
        ("took 3 s", "took 41.5 s"),
        ("loss -0.003, 12,079,736 bytes, 1e-07", "loss 0.1, 4 bytes, 0.0"),
        ("Python 3.11.7", "Python 3.12"),
        ("load [1, 20]", "load [300, 4]"),
        ("ids 22-80", "ids 7-1063"),
        ("share 13.9%", "share 4%"),
        ("layer 0: ' ' 81%  'r' 9%", "layer 0: 'e' 7%  '\\n' 12%"),
        ("first b' '", "first b'\\'x'"),
        ('first "\'"', "first ' '"),
        ("load ▁▂█", "load ▇▄▃"),
        (f"sha256 {'0f' * 32}", f"sha256 {'4e' * 32}"),
        ("  a  1\n---  -", "  a   100\n---  ---"),
    ],
)
def test_numbers_and_tokens_of_a_machine_cell_are_free(compare, stored, new):
    assert compare.output_differences(machine(printed(stored)), machine(printed(new))) == []
    assert compare.output_differences(machine(printed(new)), machine(printed(stored))) == []
    # Without the tag they count, in both directions.
    assert compare.output_differences(code(printed(stored)), code(printed(new)))
    assert compare.output_differences(code(printed(new)), machine(printed(stored)))
    assert compare.output_differences(machine(printed(stored)), code(printed(new)))


@pytest.mark.parametrize(
    "stored, new",
    [
        ("took 3 s", "took 3 ms"),
        ("hash load 3", "top-k load 3"),
        ("float32", "float64"),  # a digit inside a word
        ("loss 1.5", "loss nan"),
        ("3 of 4", "3"),
        ("one 1\ntwo 2", "one 1"),
        ("the library's source, today's", "the library's text, today's"),
        ("load ▁▂█", "load ▁▂"),  # the number of experts
        ("'r' 9%", "'r' 9% 'x' 2%"),
        ("0f0f", "4e4e"),  # a shorter digest has no machine in it
    ],
)
def test_words_of_a_machine_cell_count(compare, stored, new):
    assert len(compare.output_differences(machine(printed(stored)), machine(printed(new)))) == 1
    assert len(compare.output_differences(machine(printed(new)), machine(printed(stored)))) == 1


def test_number_and_kinds_of_the_outputs_of_a_machine_cell_count(compare):
    figure = displayed(plain="<Figure size 700x400 with 1 Axes>", png="AAAA")
    text, report = printed("took 3 s"), displayed(plain="took 3 s", html="<b>3</b>")
    different = [(), (text,), (figure,), (report,), (text, figure), (figure, text)]
    for i, stored in enumerate(different):
        for j, new in enumerate(different):
            found = compare.output_differences(machine(*stored), machine(*new))
            assert len(found) == (i != j)


def test_displays_are_compared_by_kind_and_plain_text(compare):
    figure = code(displayed(plain="<Figure size 700x400 with 1 Axes>", png="AAAA"))
    other = code(displayed(plain="<Figure size 700x400 with 1 Axes>", png="BBBB"))
    assert compare.output_differences(figure, other) == []
    no_image = code(displayed(plain="<Figure size 700x400 with 1 Axes>"))
    assert compare.output_differences(figure, no_image) == [
        "code cell 1: stored image/png, now a value"
    ]
    resized = code(displayed(plain="<Figure size 900x400 with 1 Axes>", png="AAAA"))
    assert len(compare.output_differences(figure, resized)) == 1
    report = code(displayed(plain="entropy 0.91", html="<b>0.91</b>"))
    changed = code(displayed(plain="entropy 0.71", html="<b>0.71</b>"))
    assert len(compare.output_differences(report, changed)) == 1
    assert len(compare.output_differences(report, code())) == 1


@pytest.mark.parametrize(
    "changed",
    [code(source="y"), code(tags=["machine"]), {"cells": code()["cells"][1:]}],
    ids=["text", "tags", "number"],
)
def test_source_and_notebook_must_agree(compare, changed):
    assert compare.source_differences(code(), code(printed("an output"))) == []
    assert len(compare.source_differences(changed, code())) == 1


def test_every_notebook_is_stored():
    assert [path.stem for path in STORED] == [
        "01_route_by_hand",
        "02_hash_routing",
        "03_your_own_model",
        "04_balancing",
        "05_released_checkpoint",
        "06_expert_parallelism",
        "07_your_own_router",
    ]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_notebook_is_fit_to_be_shown(path):
    assert path.stat().st_size < 400_000
    cells = json.loads(path.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    # The order of a fresh kernel, without gaps: the outputs are of one run, top to bottom.
    code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code_cells]
    assert counts == list(range(1, len(counts) + 1))
    # The first cell says what the question is and how long it takes.
    first = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown" and "?" in first
    assert re.search(r"\b(second|minute)s?\b", first)
    assert path.with_suffix(".py").is_file()
