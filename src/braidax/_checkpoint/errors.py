"""One form for everything that can be wrong with a file."""

import os

from .._checks import one_line


def mistake(path: str | os.PathLike[str], name: str, must: str, got: object) -> ValueError:
    """The error to raise: which file, which tensor or part of it, what was expected and found."""
    return ValueError(one_line(f"{os.fspath(path)}: `{name}` must {must}. Got {got}."))
