"""Every check of the project: `nox` runs the default ones, `nox -l` lists them all."""

import pathlib
import tempfile
import zipfile

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = False

PROJECT = nox.project.load_toml("pyproject.toml")
# A file stays in one process: its tests share what they have compiled.
PARALLEL = ("-n", "auto", "--dist", "loadfile")
# The session mostly compiles kernels that run once. It is there for the interfaces of old versions;
# kernels that LLVM has optimised, as a user has them, are tested on the newest versions alone.
UNOPTIMISED = "--xla_backend_optimization_level=0"
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


@nox.session
def tests(session: nox.Session) -> None:
    """Tests and doctests on the newest dependencies; annotations checked, warnings are errors."""
    session.install("-e", ".", *group("test"))
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def parallel(session: nox.Session) -> None:
    """Expert parallelism on four virtual CPU devices, which JAX must be asked for at its start."""
    session.install("-e", ".", *group("test"))
    session.run("pytest", "tests/parallel", *PARALLEL, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*group("lint"))
    session.run("ruff", "check", *LINTED)
    session.run("ruff", "format", "--check", *LINTED)


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the library."""
    session.install("-e", ".[plot,progress]", *group("types"))
    session.run("ty", "check", "--python", session.virtualenv.location, "src")


@nox.session
def tests_lowest(session: nox.Session) -> None:
    """The same tests on the lowest version of every direct dependency."""
    requirements = (*PROJECT["project"]["dependencies"], *group("test"))
    session.install("-e", ".", *map(lowest, requirements))
    # The pages of the site are run by `tests`; the library has its own tests for all that they do.
    command = ("pytest", *PARALLEL, "--ignore=tests/test_docs.py")
    session.run(*command, *session.posargs, env={"XLA_FLAGS": UNOPTIMISED})


@nox.session
def notebooks(session: nox.Session) -> None:
    """Execute every notebook in a fresh kernel; `-- --write` keeps the new outputs."""
    session.install("-e", ".[plot,progress]", *group("notebooks"))
    session.run("python", "notebooks/execute.py", *session.posargs)


@nox.session
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
    session.run("pytest", "tests/parity", *session.posargs)


@nox.session(default=False, venv_backend="virtualenv")
def bench(session: nox.Session) -> None:
    """Measure the layer beside its peers in torch; `-- --help` lists what can be chosen."""
    for requirement in group("parity"):
        session.install(requirement)
    session.install(".")
    session.run("python", "tests/benchmarks/layer_speed.py", *session.posargs)


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Take protections out of a copy of the library and see that tests fail without them."""
    session.install("-e", ".", *group("test"))
    session.run("python", "tests/mutants.py", *session.posargs)


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
