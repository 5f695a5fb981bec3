"""Routed experts that are narrower than the model: a projection in front of them and one behind."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._checks import floating_dtype, positive_integer
from .._initial import uniform
from .._matmul import accumulation_dtype


class LatentProjection(eqx.Module):
    """Two matrices around the routed experts, which then compute in `latent` features.

    Router and shared expert see the hidden states. Each token is projected once, however many
    experts it has, and an exchange over a mesh moves `latent` features a token.

    - `down`: `(latent, hidden)`, in front of the experts; `fc1_latent_proj` in Nemotron-3.
    - `up`: `(hidden, latent)`, behind their sum; `fc2_latent_proj`.

    **Source:** Nemotron-3; `NemotronHMoE` of transformers, `models/nemotron_h`.

    **Example:**

        >>> import braidax as bx, jax
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> block = bx.RoutedMoE(bx.TopKRouter(32, 4, 2, key=keys[0]),
        ...     bx.Experts(4, 8, 16, key=keys[1]), latent=bx.LatentProjection(32, 8, key=keys[2]))
        >>> block(jax.numpy.ones((4, 32)))[0].shape
        (4, 32)
    """

    down: Float[Array, "latent hidden"]
    up: Float[Array, "hidden latent"]

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `hidden_size`, `latent_size`: widths of the model, and of its routed experts.
        - `dtype`: of the weights; by default JAX's own.
        - `key`: for the weights, uniform within +-1/sqrt(fan-in).

        **Raises:** `ValueError` or `TypeError` naming the argument.
        """
        hidden = positive_integer("hidden_size", hidden_size)
        latent = positive_integer("latent_size", latent_size)
        dtype = floating_dtype("dtype", dtype)
        down_key, up_key = jax.random.split(key)
        self.down = uniform(down_key, (latent, hidden), hidden, dtype)
        self.up = uniform(up_key, (hidden, latent), latent, dtype)


def project(
    rows: Float[Array, "*batch size_in"], matrix: Float[Array, "size_out size_in"]
) -> Float[Array, "*batch size_out"]:
    """Every row times a matrix, in float32 or wider."""
    return jnp.matmul(rows, matrix.T, preferred_element_type=accumulation_dtype(rows, matrix))
