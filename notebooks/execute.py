"""Execute notebooks in a fresh kernel: `python notebooks/execute.py [--write] [NOTEBOOK ...]`.

By default a copy in memory is executed and any failing cell fails the command. `--write` executes
in place and keeps only what a reader wants: no standard error, no times, no kernel version.
"""

import argparse
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = pathlib.Path(__file__).parent
LARGEST_BYTES = 400_000
TIMEOUT_SECONDS = 600


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


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from machine to machine."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def problem(path: pathlib.Path) -> str | None:
    """What is wrong with the stored notebook, if anything."""
    if not path.is_file():
        return "there is no such file"
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        return f"{size} bytes, more than {LARGEST_BYTES}"
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    if any(output.output_type == "error" for output in outputs):
        return "an error is among its stored outputs"
    return None


def check(path: pathlib.Path, *, write: bool) -> str | None:
    """Execute one notebook, and with `write` store it. What went wrong, if anything."""
    # A notebook that is about to be replaced may be broken as it is stored.
    if (not write or not path.is_file()) and (found := problem(path)):
        return found
    try:
        notebook = execute(path)
    except CellExecutionError as error:
        return str(error)
    if write:
        clean(notebook)
        nbformat.write(notebook, path)
        return problem(path)
    return None


def main() -> int:
    """Run the command; the number of failed notebooks decides the exit code."""
    parser = argparse.ArgumentParser(description="Execute notebooks in a fresh kernel.")
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="default: all of them")
    parser.add_argument("--write", action="store_true", help="execute in place, keep the outputs")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.notebooks or sorted(HERE.glob("*.ipynb")):
        message = check(path.resolve(), write=arguments.write)
        print(f"{path.name}: {message or 'executed'}", flush=True)
        failed = failed or message is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
