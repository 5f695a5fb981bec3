"""`Routing`: the one noun that travels between the stages of a mixture-of-experts layer.

The axis names used in every annotation of the library are a closed vocabulary:
`batch tokens hidden experts experts_per_token intermediate vocab rows groups`.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Routing(eqx.Module):
    """Which experts each token goes to, and with what weight.

    A router returns it, the block computes with it, and every loss, metric and bias update is a
    function of it. Under `jax.vmap` or `jax.lax.scan` all fields gain the mapped axis in front.

    - `indices`: `(*batch, experts_per_token)` int32, the selected experts, each in `[0, experts)`.
    - `weights`: `(*batch, experts_per_token)` float32 combine weights, already normalised and
      scaled. NaN marks a token that could not be routed (an id outside the table, a NaN score).
    - `scores`: `(*batch, experts)` float32, before the selection bias.
    - `logits`: `(*batch, experts)` float32, of the gate, after the temperature.
    - `mask`: `(*batch,)` bool, `False` on padding: not counted, zero output, no gradient. `None`:
      no padding.
    - `dropped`: int32 scalar, the number of assignments that were not computed; 0 when dropless.

    **Example:**

        >>> import braidax as bx, jax
        >>> router = bx.TopKRouter(32, 8, 2, key=jax.random.key(0))
        >>> routing = router(jax.numpy.ones((4, 32)))
        >>> isinstance(routing, bx.Routing), routing.scores.shape, int(routing.dropped)
        (True, (4, 8), 0)
    """

    indices: Int[Array, "*batch experts_per_token"]
    weights: Float[Array, "*batch experts_per_token"]
    scores: Float[Array, "*batch experts"]
    logits: Float[Array, "*batch experts"]
    mask: Bool[Array, "*batch"] | None
    dropped: Int[Array, ""]


def zero_masked(
    array: Float[Array, "*batch size"], mask: Bool[Array, "*batch"] | None
) -> Float[Array, "*batch size"]:
    """Rows whose mask is `False` become 0, whatever they held.

    A select, not a product: 0 * NaN is NaN, and a NaN in padding must reach nothing, forward or
    backward.
    """
    if mask is None:
        return array
    return jnp.where(mask[..., None], array, 0)
