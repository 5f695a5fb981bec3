"""All-gather and reduce-scatter."""

import jax

from .exchange import AbstractExchange, Sizes


class Gather(AbstractExchange):
    """All-gather, then reduce-scatter: every device of the expert axis sees all of its tokens.

    Dropless, of static shapes, and runs everywhere. The traffic of a token grows with the number
    of devices. **Source:** GShard (arXiv:2006.16668).
    """

    def __call__(self, shard, tokens, indices, weights):
        """As `AbstractExchange.__call__`."""
        tokens, indices, weights = (
            jax.lax.all_gather(array, shard.axis, tiled=True)
            for array in (tokens, indices, weights)
        )
        output = shard.compute(tokens, shard.local(indices, shard.me()), weights)
        return jax.lax.psum_scatter(output, shard.axis, scatter_dimension=0, tiled=True), None

    def rows_sent(self, sizes: Sizes, size: int) -> float:
        """As `AbstractExchange.rows_sent`."""
        return float(size - 1)

    def rows_held(self, sizes: Sizes, size: int) -> tuple[int, int]:
        """As `AbstractExchange.rows_held`."""
        return 0, size * sizes.tokens
