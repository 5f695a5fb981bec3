"""How the outputs of two runs of a notebook differ, read from their dictionaries.

Words and integers must be equal. A printed float may differ by a thousandth, or by one unit of its
last printed digit: another processor rounds differently. An image must be there, whatever its
pixels. A cell with the tag `machine`, `# %% tags=["machine"]` in the source, is not compared: it
shows times, versions or the numbers of a training run.
"""

import re

# A float has a point or an exponent and is no part of a word; two points make a version.
_FLOAT = re.compile(
    r"(?<![\w.])[-+]?(?:\d[\d,]*+\.\d++(?:[eE][-+]?\d++)?+|\d++[eE][-+]?\d++)(?!\.\d)"
)
_RULE = re.compile(r"([-─=])\1+")  # as long as its column is wide


def differences(stored: dict, new: dict) -> list[str]:
    """A line for each cell whose outputs are not the stored ones."""
    found = []
    for number, (one, other) in enumerate(zip(stored["cells"], new["cells"], strict=True), 1):
        ours, theirs = shown(one), shown(other)
        if "machine" not in one["metadata"].get("tags", ()) and not same(ours, theirs):
            found.append(f"cell {number}: stored {ours!r}, now {theirs!r}")
    return found


def shown(cell: dict) -> str:
    """What a reader sees of a cell's outputs. A kernel cuts printed text wherever it likes."""
    text = ""
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream":
            text += "".join(output["text"]) if output["name"] == "stdout" else ""
        else:
            data = output.get("data", {})
            text += "\n".join(["", *sorted(data), "".join(data.get("text/plain", "")), ""])
    return text


def same(stored: str, new: str) -> bool:
    """Whether two texts have the same words and, within rounding, the same floats."""
    # Spaces and rules only align. A float that is rounded to 0 may have either sign.
    words = [_RULE.sub(r"\1", _FLOAT.sub(" <float> ", text)).split() for text in (stored, new)]
    return words[0] == words[1] and all(map(close, _FLOAT.findall(stored), _FLOAT.findall(new)))


def close(one: str, other: str) -> bool:
    """Whether two printed floats differ by a thousandth, or a unit of the last digit, at most."""
    a, b = (float(text.replace(",", "")) for text in (one, other))
    unit = max(_last_digit(one), _last_digit(other))
    # A hair more than a unit: 0.3 - 0.2 is more than 0.1 in binary.
    return abs(a - b) <= max(1e-3 * max(abs(a), abs(b)), 1.001 * unit)


def _last_digit(text: str) -> float:
    """0.01 for `1.25`, 1e-7 for `2.4e-06`."""
    mantissa, _, exponent = text.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
