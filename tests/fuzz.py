"""Damaged input, and what it does: each works or gives one clear error.

A new reader is one row of `TARGETS` in fuzz_targets.py. `BRAIDAX_FUZZ=10000 pytest
tests/test_fuzz.py` is the long run; `run(target, count, seed, folder)` is what it calls.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

MOST_SECONDS = 5.0
MOST_BYTES = 500 * 2**20
LONGEST_MESSAGE = 800


@dataclasses.dataclass(frozen=True)
class Target:
    """One reader under test.

    `generate(random)` makes an input, `use(input, folder)` hands it to the reader in an empty
    folder. `use` returns None where the input works and the message where it is refused; whatever
    it raises is a finding.
    """

    name: str
    generate: Callable[[random.Random], Any]
    use: Callable[[Any, pathlib.Path], str | None]


@dataclasses.dataclass(frozen=True)
class Finding:
    """An input that did something else: `number` and the run's seed make it again."""

    number: int
    what: str
    input: str


@dataclasses.dataclass
class Result:
    """How many inputs worked, how many were refused, and the findings."""

    worked: int = 0
    refused: int = 0
    slowest: float = 0.0
    findings: list[Finding] = dataclasses.field(default_factory=list)


def run(target: Target, count: int, seed: int, folder: pathlib.Path) -> Result:
    """Give `count` inputs to `target`, each decided by `(seed, number)` alone."""
    result = Result()
    for number in range(count):
        given = target.generate(random.Random(f"{seed} {number}"))
        begin, peak = time.perf_counter(), _peak_bytes()
        try:
            with _limits():
                message = target.use(given, folder)
            what = _complaint(message)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            message, what = None, f"{type(error).__name__}: {str(error)[:300]}"
        seconds = time.perf_counter() - begin
        result.slowest = max(result.slowest, seconds)
        if seconds > MOST_SECONDS:
            what = f"{seconds:.1f} s"
        if _peak_bytes() - peak > MOST_BYTES:
            what = f"{(_peak_bytes() - peak) / 2**20:.0f} MiB"
        result.worked += message is None and not what
        result.refused += message is not None and not what
        if what:
            result.findings.append(Finding(number, what, repr(given)[:300]))
    return result


def _complaint(message: str | None) -> str:
    """What is wrong with an error message; empty where nothing is."""
    if message is None:
        return ""
    if not message.strip():
        return "an empty message"
    if "\n" in message or not message.isprintable():
        return f"not one printable line: {message[:200]!r}"
    return f"{len(message)} characters" if len(message) > LONGEST_MESSAGE else ""


class Hang(BaseException):
    """Not an `Exception`: no reader may take it for a damaged file."""


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Interrupt after the longest time and refuse memory beyond the most, where the system can."""

    def interrupt(number, frame):
        raise Hang(f"no answer in {MOST_SECONDS} s")

    old_handler = signal.signal(signal.SIGALRM, interrupt)
    old_limit = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, old_limit[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, old_limit)


def _peak_bytes() -> int:
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Damage that any reader of bytes must stand.


def damaged(data: bytes, generator: random.Random) -> bytes:
    """`data` with one to three of: cut off, bits flipped, a piece removed, doubled or replaced."""
    for _ in range(generator.randint(1, 3)):
        start, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
        kind = generator.randrange(6)
        if kind == 0:
            data = data[:start]
        elif kind == 1 and data:
            flipped = bytearray(data)
            for _ in range(generator.choice((1, 1, 2, 20))):
                flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            data = bytes(flipped)
        elif kind == 2:
            data = data[:start] + data[end:]
        elif kind == 3:
            data = data[:end] + data[start:end] * generator.choice((1, 1, 50)) + data[end:]
        elif kind == 4:
            data = data[:start] + generator.randbytes(generator.choice((1, 8, 300))) + data[end:]
        else:
            data = generator.choice((b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\0")) + data
    return data


# What stands where a number or a name should. Text is written into JSON as it is.
_ODD_JSON = (
    *("null", "true", "false", "0", "-1", "1", "2", "7", "0.0", "-0.0", "1.5", "1e400", "-1e400"),
    *("NaN", "Infinity", "-Infinity", "1e308", "5e-324", "2147483647", "2147483648", "1e99999"),
    *("9223372036854775808", "9" * 400, "9" * 4300, "9" * 5000, "-" + "9" * 400, "[" * 2000),
    *('""', '"8"', '"nan"', '"silu"', '"softmax"', '"\\ud800"', '"\\u0000"', '"\\n"', "[]", "{}"),
    *("[1, 2]", '{"a": 1}', '["hash_moe"]', '["moe", "hash_moe"]', "[null]", "[" * 900 + "]" * 900),
    *("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"text_config":' * 500 + "{}" + "}" * 500),
    *('"' + "x" * 100_000 + '"', "[" + "1," * 50_000 + "1]", "1 2", "", ",", '"'),
)


def json_text(seeds: tuple[dict, ...], generator: random.Random) -> bytes:
    """One of `seeds` as JSON, with values replaced, keys dropped or renamed, or bytes damaged."""
    base = generator.choice(seeds)
    items = [(key, json.dumps(value)) for key, value in base.items()]
    for _ in range(generator.choice((0, 1, 1, 1, 2, 4))):
        position, kind = generator.randrange(len(items)), generator.randrange(5)
        key, value = items[position]
        if kind == 0 and len(items) > 1:
            del items[position]
        elif kind == 1:
            other = generator.choice([*generator.choice(seeds)])
            items[position] = (other, value)
        elif kind == 2:
            items.append((key, generator.choice(_ODD_JSON)))
        else:
            items[position] = (key, generator.choice(_ODD_JSON))
    text = "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in items) + "}"
    if generator.random() < 0.1:
        text = f'{{"text_config": {text}, "hidden_size": {generator.choice(_ODD_JSON)}}}'
    data = text.encode()
    return damaged(data, generator) if generator.random() < 0.4 else data
