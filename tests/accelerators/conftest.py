"""What the tests of this folder found, as one table."""

import os

# Two processes may compile for a TPU at a time: none of them has one.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor is this a machine with metadata of one


def pytest_terminal_summary(terminalreporter):
    """A row for every program: where it runs, its temporary memory, and what multiplies."""
    rows = [
        value
        for report in terminalreporter.stats.get("passed", [])
        + terminalreporter.stats.get("failed", [])
        for name, value in getattr(report, "user_properties", ())
        if name == "program"
    ]
    if rows:
        terminalreporter.section("temporary memory, beside arguments and results")
        terminalreporter.line("| layer | chip | dtype | program | GB | products |")
        terminalreporter.line("|---|---|---|---|---|---|")
    for *words, temporary, kernel in sorted(rows):
        terminalreporter.line(f"| {' | '.join(words)} | {temporary / 1e9:.2f} | {kernel} |")
