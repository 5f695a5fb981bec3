"""Settings and fixtures of all tests.

Nothing here may import `braidax` at module level: jaxtyping's import hook can only check packages
that are imported after it.
"""

import itertools

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


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
