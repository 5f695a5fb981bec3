"""The Python blocks of a Markdown page, run as a reader would: from top to bottom."""

import doctest
import re

import jax

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text):
    """`(line, source)` of the Python blocks of a page, in order."""
    found = BLOCK.finditer(text)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


def run_page(path):
    """The names that the page has defined at its end."""
    names = {"__name__": "docs"}
    with jax.numpy_rank_promotion("allow"):  # as a reader has it
        for line, source in blocks(path.read_text(encoding="utf-8")):
            _run_block(str(path), line, source, names)
    return names


def definition(path, name, **given):
    """The class `name` of a page, from its block alone; `given` is what the block needs."""
    text = path.read_text(encoding="utf-8")
    ((line, source),) = [block for block in blocks(text) if f"class {name}(" in block[1]]
    _run_block(str(path), line, source, given)
    return given[name]


def _run_block(name, line, source, names):
    """A block with prompts is a doctest; one without is a program."""
    if not source.startswith(">>>"):
        exec(compile("\n" * (line - 1) + source, name, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(source, names, name, name, line - 1)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append, clear_globs=False)
    names.update(test.globs)  # a copy
    assert report == [], "".join(report)
