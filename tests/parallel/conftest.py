"""Four virtual CPU devices, which have to be asked for before JAX starts: a session of its own."""

import os

# Most of the time goes into compiling: a third of it is saved without LLVM's optimizations, which
# come after everything that is audited here.
_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_backend_optimization_level=0"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
