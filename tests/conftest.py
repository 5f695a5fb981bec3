"""Settings and fixtures of all tests.

Nothing here may import `braidax` at module level: jaxtyping's import hook can only check packages
that are imported after it.
"""

import itertools

import jax
import jaxtyping
import pytest
from hazards import HAZARDS, summary_lines
from hypothesis import HealthCheck, settings

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


def pytest_terminal_summary(terminalreporter):
    """The table of hazards, of those whose tests ran."""
    lines = summary_lines(HAZARDS, terminalreporter.stats)
    if lines:
        terminalreporter.section("hazards, by tests/hazards.py")
        for line in lines:
            terminalreporter.write_line(line)
