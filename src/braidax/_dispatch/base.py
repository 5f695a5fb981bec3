"""The contract of a dispatch: tokens to rows grouped by expert, and back."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Int


class AbstractDispatch(eqx.Module):
    """A plan made of integers, with the two ends that carry it out.

    - `group_sizes` says how many consecutive rows belong to each expert. Rows past their sum
      belong to nobody.
    - `gather` copies tokens into rows.
    - `combine` sums each token's rows, times its weights, in the dtype of the rows.
    """

    group_sizes: eqx.AbstractVar[Int[Array, " groups"]]

    @abc.abstractmethod
    def gather(self, hidden_states: Float[Array, "tokens hidden"]) -> Float[Array, "rows hidden"]:
        """The token of every row."""

    @abc.abstractmethod
    def combine(
        self,
        rows: Float[Array, "rows hidden"],
        weights: Float[Array, "tokens experts_per_token"],
    ) -> Float[Array, "tokens hidden"]:
        """Sum over each token's rows, weighted. An expert that a token names twice adds twice."""
