"""Execute notebooks in a fresh kernel: `python notebooks/execute.py [--write] [NOTEBOOK ...]`.

A notebook is paired with a source in jupytext's percent format, the file to edit. The command fails
if a cell fails, if new outputs differ from the stored ones (`compare.py`), or if source and
notebook disagree. `--write` makes the notebook from its source and stores its new outputs, without
standard error, times of cells and the kernel's version.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import re
import sys
import time

import jupytext
import nbformat
from compare import differences
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

HERE = pathlib.Path(__file__).parent
TIMEOUT_SECONDS = 600
_COLOR = re.compile(r"\x1b\[[0-9;]*m")  # of a traceback


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new run."""
    options = {"timeout": TIMEOUT_SECONDS, "kernel_name": "python3", "record_timing": False}
    resources = {"metadata": {"path": str(HERE)}}
    return NotebookClient(notebook, resources=resources, **options).execute()


def updated(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook of a source, executed, as it is to be stored."""
    source = jupytext.read(path.with_suffix(".py"))
    if path.exists():
        source = jupytext.combine.combine_inputs_with_outputs(source, nbformat.read(path, 4))
    notebook = execute(source)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def contents(notebook: nbformat.NotebookNode) -> list[tuple]:
    """What source and notebook have in common."""
    return [(c.cell_type, c.source.rstrip(), c.metadata.get("tags", [])) for c in notebook.cells]


def check(path: pathlib.Path, *, write: bool) -> bool:
    """Check one notebook, or make and store it, and print a line about it. Whether it passed."""
    start, problems = time.monotonic(), []
    try:
        if write:
            nbformat.write(updated(path), path)
        stored = nbformat.read(path, as_version=4)
        if contents(stored) != contents(jupytext.read(path.with_suffix(".py"))):
            problems = ["not the cells of its source: --write makes them"]
        elif not write:
            problems = differences(stored, execute(nbformat.read(path, as_version=4)))
    except (CellExecutionError, CellTimeoutError, FileNotFoundError) as error:
        problems = [_COLOR.sub("", str(error))]
    seconds = time.monotonic() - start
    print(f"{path.name}, {seconds:.0f} s:", *(problems or ["executed"]), sep="\n  ", flush=True)
    return not problems


def main() -> int:
    """Run the command; the exit code says whether a notebook failed."""
    parser = argparse.ArgumentParser(description="Execute notebooks in a fresh kernel.")
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="default: all of them")
    parser.add_argument("--write", action="store_true", help="execute in place, keep the outputs")
    arguments = parser.parse_args()
    # A source may have no notebook yet.
    named = {path.with_suffix(".ipynb") for path in HERE.glob("[0-9]*")}
    # One at a time with --write: times that are kept are those of a machine that does nothing else.
    with concurrent.futures.ThreadPoolExecutor(1 if arguments.write else 2) as pool:
        one = functools.partial(check, write=arguments.write)
        return int(not all(list(pool.map(one, arguments.notebooks or sorted(named)))))


if __name__ == "__main__":
    sys.exit(main())
