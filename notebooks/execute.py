"""Execute notebooks in a fresh kernel: `python notebooks/execute.py [--write] [NOTEBOOK ...]`.

Each notebook is paired with a source in jupytext's percent format, the file to edit. By default a
copy in memory is executed. The command fails where a cell fails, where the new outputs are not the
stored ones (`compare.py` says how equal they must be), or where source and notebook disagree.
`--write` makes the notebook from its source, executes it in place and keeps only what a reader
wants: no standard error, no times of cells, no kernel version. Two notebooks are executed at a
time, with `--write` one: times that they print are to be those of a machine that does nothing else.
"""

import argparse
import concurrent.futures
import functools
import pathlib
import re
import subprocess
import sys
import time

import jupytext
import nbformat
from compare import output_differences, source_differences
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

HERE = pathlib.Path(__file__).parent
OWN = ("compare.py", "execute.py")
LARGEST_BYTES = 400_000
TIMEOUT_SECONDS = 600
AT_A_TIME = 2
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of a traceback


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new run; `CellExecutionError` where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
    )
    return client.execute()


def update(path: pathlib.Path) -> None:
    """Bring the cells of the paired source into the notebook; cell ids and outputs are kept."""
    source = str(path.with_suffix(".py"))
    command = ["jupytext", "--quiet", "--to", "ipynb", "--update", source]
    subprocess.run([sys.executable, "-m", *command], check=True)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from machine to machine."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def problems(path: pathlib.Path) -> list[str]:
    """What is wrong with the stored notebook."""
    if not path.is_file():
        return ["there is no such file"]
    found = []
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        found.append(f"{size} bytes, more than {LARGEST_BYTES}")
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if any(output.output_type == "error" for output in outputs):
        found.append("an error is among its stored outputs")
    source = path.with_suffix(".py")
    if not source.is_file():
        return [*found, f"there is no {source.name} beside it"]
    return found + source_differences(jupytext.read(source), notebook)


def check(path: pathlib.Path, *, write: bool) -> list[str]:
    """Execute one notebook, and with `write` make and store it. What went wrong."""
    if write:
        update(path)
    elif found := problems(path):
        return found
    try:
        notebook = execute(path)
    except (CellExecutionError, CellTimeoutError) as error:
        return [_COLOUR.sub("", str(error))]
    if write:
        clean(notebook)
        nbformat.write(notebook, path)
        return problems(path)
    return output_differences(nbformat.read(path, as_version=4), notebook)


def report(path: pathlib.Path, *, write: bool) -> bool:
    """Check one notebook and print a line about it. Whether it passed."""
    start = time.monotonic()
    messages = check(path.resolve(), write=write)
    seconds = time.monotonic() - start
    print(f"{path.name}, {seconds:.0f} s: {'; '.join(messages) or 'executed'}", flush=True)
    return not messages


def all_notebooks() -> list[pathlib.Path]:
    """The notebooks of this folder, by name: also a source that has no notebook yet."""
    sources = [path for path in HERE.glob("*.py") if path.name not in OWN]
    return sorted({*HERE.glob("*.ipynb"), *(path.with_suffix(".ipynb") for path in sources)})


def main() -> int:
    """Run the command; the exit code says whether a notebook failed."""
    parser = argparse.ArgumentParser(description="Execute notebooks in a fresh kernel.")
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="default: all of them")
    parser.add_argument("--write", action="store_true", help="execute in place, keep the outputs")
    arguments = parser.parse_args()
    workers = 1 if arguments.write else AT_A_TIME
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        one = functools.partial(report, write=arguments.write)
        passed = list(pool.map(one, arguments.notebooks or all_notebooks()))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
