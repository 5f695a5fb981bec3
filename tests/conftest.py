"""Settings and fixtures of all tests.

Nothing here may import `braidax` at module level: jaxtyping's import hook can only check packages
that are imported after it.
"""

import itertools
import os

import pytest

# Compiling is what a test costs, and half of compiling is optimizing a program that runs once.
# Tests marked `optimized` are compiled with optimizations; JAX_DISABLE_MOST_OPTIMIZATIONS=0 does so
# with all of them. Programs that tests start inherit the variable.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

FAST = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() not in ("0", "false")
jax.config.update("jax_disable_most_optimizations", FAST)  # jax may have been imported earlier
jax.config.update("jax_num_cpu_devices", 4)  # what tests/parallel shares its work among
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling takes seconds at the first example and the clock of a shared machine says little.
_PROFILE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("fixed", max_examples=20, derandomize=True, **_PROFILE)
settings.register_profile("long", max_examples=2000, **_PROFILE)
settings.load_profile("fixed")  # `--hypothesis-profile=long` for other and more examples.


@pytest.fixture
def getkey():
    """A function that returns a new random key at each call, the same sequence in every test."""
    counter = itertools.count()
    return lambda: jax.random.fold_in(jax.random.key(0), next(counter))


@pytest.fixture
def unchecked():
    """Switches the annotation checks of the import hook off, so that the library's own argument
    errors answer, as they do for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compile an `optimized` test with optimizations, and share no program with the others."""
    fast = FAST and item.get_closest_marker("optimized") is None
    if jax.config.read("jax_disable_most_optimizations") != fast:
        jax.config.update("jax_disable_most_optimizations", fast)
        jax.clear_caches()


def pytest_collection_modifyitems(items):
    """Hazards travel with the reports of their tests, also from the processes of pytest-xdist."""
    for item in items:
        marks = list(item.iter_markers("hazard"))
        item.user_properties += [("hazard", (mark.args, mark.kwargs)) for mark in marks]
        if item.path.name.startswith("test_hazards") and not marks:
            raise pytest.UsageError(f"{item.nodeid} needs the mark of its hazard.")


def pytest_terminal_summary(terminalreporter):
    """The hazards whose tests ran: a line each, and how many were held."""
    results, outcomes, exceptions = {}, {}, {}
    for result in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(result, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == "hazard":
                    (number, *outcome), options = value
                    results.setdefault(number, []).append(result == "passed")
                    outcomes.update((number, text) for text in outcome)
                    exceptions.update((number, f" [not: {text}]") for text in options.values())
    if results:
        terminalreporter.section("hazards")
        for number, ran in sorted(results.items()):
            verdict = "passed" if all(ran) else "FAILED"
            text = outcomes.get(number, "") + exceptions.get(number, "")
            terminalreporter.line(f"{number:2}  {verdict}  {len(ran):3} tests  {text}")
        held = sum(map(all, results.values()))
        terminalreporter.line(f"{held} of {len(results)} hazards passed")
