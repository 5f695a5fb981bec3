"""Every check of the project: `nox` runs the default ones, `nox -l` lists them all."""

import pathlib
import tempfile
import zipfile

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True  # never a silent skip

PROJECT = nox.project.load_toml("pyproject.toml")
# Each process takes neighbours, which share what they have compiled, until there is none left.
PYTEST = ("pytest", "-n", "auto", "--dist", "worksteal", "--durations=25")
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # the programs that a user gets
LINTED = ("src", "tests", "notebooks", "docs", "noxfile.py")


def group(name: str) -> tuple[str, ...]:
    """The requirements of one dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PROJECT, name)


def lowest(requirement: str) -> str:
    """The same requirement, pinned to its lower bound: `jax>=0.9` becomes `jax==0.9`."""
    parsed = Requirement(requirement)
    (bound,) = parsed.specifier
    if bound.operator not in (">=", "=="):
        raise ValueError(f"{requirement} must have one lower bound.")
    return f"{parsed.name}=={bound.version}"


def run_tests(session: nox.Session, *kinds: str) -> None:
    """Tests of some kinds, a process each: XLA's options hold for a whole process."""
    session.install("-e", ".", *group("test"))
    for kind in kinds:
        # A path among the arguments may leave no test of a kind: exit code 5.
        session.run(*PYTEST, "-m", kind, *session.posargs, success_codes=[0, 5])


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and static types."""
    session.install("-e", ".[plot,progress]", *group("lint"))
    session.run("ruff", "check", *LINTED)
    session.run("ruff", "format", "--check", *LINTED)
    session.run("ty", "check", "--python", session.virtualenv.location, "src")


@nox.session
def tests(session: nox.Session) -> None:
    """Tests and doctests on the newest dependencies; annotations checked, warnings are errors.

    `nox -s tests -P 3.13` runs them on another Python than the one that runs nox.
    """
    run_tests(session, "not slow and not optimized")


@nox.session(default=False)
def tests_slow(session: nox.Session) -> None:
    """The tests that `tests` leaves out: whole programs, pages, and more of the same cases. Those
    marked `optimized` are compiled as a user's programs, all others fast."""
    run_tests(session, "slow and not optimized", "optimized")


@nox.session(default=False)
def tests_lowest(session: nox.Session) -> None:
    """Every interface once, on the lowest version of every direct dependency."""
    requirements = (*PROJECT["project"]["dependencies"], *group("test"))
    session.install("-e", ".", *map(lowest, requirements))
    session.run(*PYTEST, "-m", "not optimized", "tests/lowest", *session.posargs)


@nox.session(default=False)
def accelerators(session: nox.Session) -> None:
    """Compile whole layers for GPUs and a TPU that are not here: memory, kernels, collectives.

    `cuda12-local` is the compiler without CUDA's libraries, and `tpu` is libtpu, both of the
    versions that belong to jax."""
    session.install("-e", ".", *group("test"), "jax[cuda12-local,tpu]")
    environment = {**OPTIMIZED, "JAX_PLATFORMS": "cpu"}
    session.run(*PYTEST, "tests/accelerators", *session.posargs, env=environment)


@nox.session(default=False)
def notebooks(session: nox.Session) -> None:
    """Execute every notebook in a fresh kernel; `-- --write` keeps the new outputs."""
    session.install("-e", ".[plot,progress]", *group("notebooks"))
    session.run("python", "notebooks/execute.py", *session.posargs)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the site in `site`; a broken link or docstring is an error, and so is a page that asks
    another host for anything."""
    session.install(*group("docs"))
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("python", "docs/offline.py", "site")


# virtualenv, because pip and not uv is what knows where a local torch wheel lies.
@nox.session(default=False, venv_backend="virtualenv")
def parity(session: nox.Session) -> None:
    """Compare with the PyTorch reference; `-- --write-golden` renews the golden files."""
    # torch first and alone: transformers would take any.
    for requirement in group("parity"):
        session.install(requirement)
    session.install("-e", ".", *group("test"))
    session.run("pytest", "tests/parity", *session.posargs, env=OPTIMIZED)


@nox.session(default=False, venv_backend="virtualenv")
def bench(session: nox.Session) -> None:
    """Measure the layer beside its peers in torch; `-- --help` lists what can be chosen."""
    for requirement in group("parity"):
        session.install(requirement)
    session.install(".")
    session.run("python", "tests/benchmarks/layer_speed.py", *session.posargs)


@nox.session(default=False)
def study(session: nox.Session) -> None:
    """Train the small models of docs/study.md and print its table; a stopped study goes on."""
    session.install(".", *group("test"))
    session.run("python", "tests/benchmarks/study.py", *session.posargs)


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Take protections out of a copy of the library and see that tests fail without them."""
    session.install("-e", ".", *group("test"))
    session.run("python", "tests/mutants.py", *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Give thousands of damaged files and odd arguments to the readers; `-- 10000` for more."""
    session.install("-e", ".", *group("test"))
    count = session.posargs[0] if session.posargs else "3000"
    session.run(*PYTEST, "tests/test_fuzz.py", env={"BRAIDAX_FUZZ": count})


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the wheel and check that it is typed and carries its licence."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder)
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("braidax/py.typed", "licenses/LICENSE"):
        if not any(name.endswith(wanted) for name in names):
            session.error(f"{wanted} is not in {wheel.name}.")
