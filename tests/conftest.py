"""Settings and fixtures of all tests.

Nothing here may import `braidax` at module level: jaxtyping's import hook can only check packages
that are imported after it.
"""

import itertools
import os

import pytest

# Compiling is what a test costs, and much of compiling is optimizing a program that runs once.
# Tests marked `optimized` are compiled with optimizations; JAX_DISABLE_MOST_OPTIMIZATIONS=0 does so
# with all of them. Programs that tests start inherit the variables.
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


def pytest_configure(config):
    """With `-m "not optimized"` XLA does not fuse operations either: a third of the compile time.

    The option ends with jaxlib 0.10. It holds for a whole process, so the `optimized` tests run in
    one of their own.
    """
    flags, unfused = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"
    whole = "not optimized" in config.option.markexpr and FAST
    if whole and jax.__version_info__ < (0, 11) and unfused not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {unfused}".strip()


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


def pytest_terminal_summary(terminalreporter, config):
    """The hazards whose tests ran: a line each, and how many were held.

    A run of what `nox -s tests` leaves out adds to the runs before it.
    """
    rows = {}  # {number: [passed, failed, outcome, exception]}
    cache = getattr(config, "cache", None)  # `-p no:cacheprovider` leaves none
    if cache and config.option.markexpr in ("slow and not optimized", "optimized"):
        rows = {int(n): row for n, row in cache.get("braidax/hazards", {}).items()}
    for result in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(result, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == "hazard":
                    (number, *outcome), options = value
                    row = rows.setdefault(number, [0, 0, "", ""])
                    row[result != "passed"] += 1
                    row[2:] = (*outcome, *options.values(), "")[:2] if outcome else row[2:]
    if rows and not hasattr(config, "workerinput"):
        if cache:
            cache.set("braidax/hazards", rows)
        terminalreporter.section("hazards")
        for number, (passed, failed, outcome, exception) in sorted(rows.items()):
            verdict, tests = "FAILED" if failed else "passed", passed + failed
            limit = f" [not: {exception}]" if exception else ""
            terminalreporter.line(f"{number:2}  {verdict}  {tests:3} tests  {outcome}{limit}")
        held = sum(not failed for _, failed, _, _ in rows.values())
        terminalreporter.line(f"{held} of {len(rows)} hazards passed")
