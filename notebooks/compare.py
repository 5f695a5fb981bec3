"""What two versions of a notebook disagree in, read from their dictionaries: no kernel, no library.

Printed integers and words must be equal. A printed float may differ by `RELATIVE` of its value, or
by one unit of its last printed digit if that is more: another processor rounds differently. Images
must be there, whatever their pixels. A cell with the tag `machine`, `# %% tags=["machine"]` in the
source, shows what differs between machines by more, as times, versions and the numbers of a
training run. There every number is free, and so are a SHA-256, the heights of a bar chart and what
stands between quotes, as a token of the text; number and kinds of the outputs, lines and all other
words must be equal.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

RELATIVE = 1e-3
MACHINE = "machine"

# A float has a point or an exponent and is no part of a word; two points make a version.
_FLOAT = re.compile(
    r"(?<![\w.])[-+]?(?:\d[\d,]*+\.\d++(?:[eE][-+]?\d++)?+|\d++[eE][-+]?\d++)(?!\.\d)"
)
_RULE = re.compile(r"([-─=])\1+")  # as long as its column is wide

# Of a `machine` cell. A quote inside a word is an apostrophe, a digit inside a word its spelling.
_QUOTED = re.compile(r"""(?<!\w)b?(?:'(?:[^'\\\n]|\\.)+'|"(?:[^"\\\n]|\\.)+")(?!\w)""")
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*+(?:\.\d++)*+(?:[eE][-+]?\d++)?+(?!\w)")
_BAR = re.compile(r"[▁▂▃▄▅▆▇█]")


def output_differences(stored: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each cell whose stored outputs are not those of the new run."""
    differences = []
    pairs = zip(_code_cells(stored), _code_cells(new), strict=True)
    for number, (one, other) in enumerate(pairs, 1):
        # A tag on one side alone takes no number out of the comparison.
        machine = all(MACHINE in _tags(cell) for cell in (one, other))
        shown = [list(_shown(cell, machine=machine)) for cell in (one, other)]
        found = _difference(*shown)
        if found is not None:
            differences.append(f"code cell {number}: {found}")
    return differences


def source_differences(source: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """How the cells of a paired source differ from the stored ones: type, text or tags."""
    ours, theirs = (list(map(_content, notebook["cells"])) for notebook in (source, stored))
    if len(ours) != len(theirs):
        return [f"{len(ours)} cells in the source, {len(theirs)} in the notebook"]
    pairs = enumerate(zip(ours, theirs, strict=True), 1)
    return [f"cell {number} is not that of the source" for number, (a, b) in pairs if a != b]


def text_difference(stored: str, new: str) -> str | None:
    """The first line in which two printed texts disagree, as a message; None if there is none."""
    ours, theirs = stored.rstrip().splitlines(), new.rstrip().splitlines()
    for one, other in zip(ours, theirs, strict=False):
        if not _same_line(one, other):
            return f"stored {one.strip()!r}, now {other.strip()!r}"
    if len(ours) != len(theirs):
        return f"stored {len(ours)} lines, now {len(theirs)}"
    return None


def _difference(stored: list[tuple[str, str]], new: list[tuple[str, str]]) -> str | None:
    kinds = [[kind for kind, _ in shown] for shown in (stored, new)]
    if kinds[0] != kinds[1]:
        return f"stored {', '.join(kinds[0]) or 'nothing'}, now {', '.join(kinds[1]) or 'nothing'}"
    texts = (text_difference(one, other) for (_, one), (_, other) in zip(stored, new, strict=True))
    return next(filter(None, texts), None)


def _masked(text: str) -> str:
    """What must be the same on every machine."""
    text = _BAR.sub("▄", _SHA256.sub("<sha256>", _QUOTED.sub("<quoted>", text)))
    return _NUMBER.sub(" <number> ", text)


def _shown(cell: Mapping[str, Any], *, machine: bool) -> Iterator[tuple[str, str]]:
    """What is compared of a cell, in order: `(kind, text)`, of a `machine` cell its words."""
    compared = _masked if machine else str
    yield from ((kind, compared(text)) for kind, text in _outputs(cell))


def _outputs(cell: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a reader sees of a cell, in order: `(kind, text)`, printed text in one piece."""
    printed = ""
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream":
            # A kernel cuts printed text into pieces wherever it likes.
            printed += _text(output["text"]) if output["name"] == "stdout" else ""
            continue
        if printed:
            yield "text", printed
            printed = ""
        data = output.get("data", {})
        kinds = sorted(set(data) - {"text/plain"})
        yield " and ".join(kinds) or "a value", _text(data.get("text/plain", ""))
    if printed:
        yield "text", printed


def _same_line(one: str, other: str) -> bool:
    if _words(one) != _words(other):
        return False
    return all(map(_close, _FLOAT.findall(one), _FLOAT.findall(other)))


def _words(line: str) -> list[str]:
    """Everything but the floats, whose place is kept; spaces and rules only align."""
    # A sign belongs to its float, and a float that is rounded to 0 may have either.
    return _RULE.sub(r"\1", _FLOAT.sub(" <float> ", line)).split()


def _close(one: str, other: str) -> bool:
    a, b = (float(text.replace(",", "")) for text in (one, other))
    unit = max(_last_digit(one), _last_digit(other))
    # A hair more than a unit: 0.3 - 0.2 is more than 0.1 in binary.
    return abs(a - b) <= max(RELATIVE * max(abs(a), abs(b)), 1.001 * unit)


def _last_digit(text: str) -> float:
    """One unit of the last digit of a printed float: 0.01 for `1.25`, 1e-7 for `2.4e-06`."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals)


def _code_cells(notebook: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _content(cell: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    return cell["cell_type"], _text(cell["source"]).rstrip(), _tags(cell)


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return list(cell.get("metadata", {}).get("tags", ()))


def _text(text: str | list[str]) -> str:
    """A notebook's file may hold a text as a list of lines."""
    return text if isinstance(text, str) else "".join(text)
