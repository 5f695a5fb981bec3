"""Four virtual CPU devices, which have to be asked for before JAX starts: a session of its own."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
