"""Two threads for torch, and a table of the largest error of every configuration."""

from collections.abc import Callable, Mapping

import pytest
import torch

torch.set_num_threads(2)

_ROWS = pytest.StashKey[list[tuple[str, str, dict[str, float]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small are slower on several threads, which compete with those of JAX."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def record(request) -> Callable[[str, str, Mapping[str, float], float], None]:
    """`record(name, configuration, errors, excluded)` adds a row to the table.

    `errors` maps a column to the largest error relative to the largest entry of the reference;
    columns that a row does not name stay empty. `excluded` is the share of rows whose selection
    is a tie within rounding.
    """
    rows = request.config.stash[_ROWS]

    def add(name, configuration, errors, excluded=0.0):
        rows.append((name, configuration, {**errors, "excluded": excluded}))

    return add


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Printed on success too: the numbers are what the session is for."""
    rows = config.stash[_ROWS]
    if not rows:
        return
    # "excluded" is last, whatever columns the later rows add.
    columns = dict.fromkeys(column for _, _, errors in rows for column in errors)
    columns = [*(column for column in columns if column != "excluded"), "excluded"]
    names = dict.fromkeys(name for name, _, _ in rows)
    table = [("", "configuration", {column: column for column in columns})]
    table += rows
    table += [_largest(rows, name, columns) for name in names]
    cells = [
        (name, configuration, *(_text(errors.get(column)) for column in columns))
        for name, configuration, errors in table
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    terminalreporter.section("largest error / largest entry of the reference")
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        terminalreporter.write_line("  ".join([*left, *right]).rstrip())


def _largest(rows, name, columns):
    """One row for all of a name: what the table of `docs/parity.md` shows."""
    errors = [row[2] for row in rows if row[0] == name]
    largest = {
        column: max(error[column] for error in errors if column in error)
        for column in columns
        if any(column in error for error in errors)
    }
    return name, f"largest of {len(errors)}", largest


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return "0" if value == 0 else f"{value:.1e}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="renew tests/golden from the reference"
    )
