"""A second eager call compiles nothing: a function that did would be slow and leak, for ever.

The calls are the examples of the docstrings. Every public name has one, so a new name is tested.
"""

import doctest
import re

import jax
import pytest
from test_docstrings import PUBLIC, own_text

PARSER = doctest.DocTestParser()
EXAMPLES = {name: PARSER.get_examples(own_text(name)) for name in PUBLIC}
COMPILED = re.compile("^(Compiling|Finished XLA compilation of) ")


def run(examples, names):
    exec(compile("".join(example.source for example in examples), "example", "exec"), names)


@pytest.mark.parametrize("name", [name for name, examples in EXAMPLES.items() if examples])
def test_a_second_call_compiles_nothing(name, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    run(EXAMPLES[name], names)
    caplog.clear()
    with jax.log_compiles():
        # A class is defined once: another class of the same name is another program.
        run([e for e in EXAMPLES[name] if not e.source.startswith("class ")], names)
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if COMPILED.match(message)] == []


def test_a_compilation_is_seen(caplog):
    with jax.log_compiles():
        jax.jit(lambda x: x + 1)(jax.numpy.ones(3))
    assert any(COMPILED.match(record.getMessage()) for record in caplog.records)
