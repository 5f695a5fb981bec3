"""The block with a shared expert, which every token passes."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, DTypeLike, Float, Integer, PRNGKeyArray

from .._checks import boolean, integer, same_sizes
from .._compiled import compiled
from .._config import MoEConfig, activation
from .._experts import FeedForward
from .._initial import uniform
from .._routing import Routing, zero_masked
from .latent import project
from .routed import RoutedMoE, have_shapes, routed_sum


class RoutedAndSharedMoE(eqx.Module):
    """Routed experts plus a shared expert that every token passes: DeepSeek's MoE layer.

    The shared output is added unscaled, in float32, and the sum is rounded once. **Source:**
    DeepSeek-V4 (arXiv:2606.19348), section 2.1.

    **Example:**

        >>> import braidax as bx, jax
        >>> block = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 0, key=jax.random.key(0))
        >>> output, routing = block(jax.numpy.ones((4, 32)), jax.numpy.arange(4))  # hashed
        >>> bool((routing.indices == block.routed.router.table[:4]).all())
        True
    """

    routed: RoutedMoE
    shared: FeedForward
    shared_gate: Float[Array, "1 hidden"] | None

    def __init__(
        self,
        routed: RoutedMoE,
        shared: FeedForward,
        *,
        shared_gate: Float[Array, "1 hidden"] | None = None,
    ):
        """**Arguments:**

        - `routed`: a `RoutedMoE`.
        - `shared`: a `FeedForward`, or any module from `(*batch, hidden)` to `(*batch, hidden)`.
        - `shared_gate`: `(1, hidden)`: each token's shared output is multiplied by the sigmoid of
            its product with the gate (Qwen2-MoE).

        **Raises:** `ValueError` if the hidden sizes differ.
        """
        weight: Any = getattr(routed.router.gate, "weight", None)
        if isinstance(shared, FeedForward) and have_shapes(shared.gate_up, weight):
            sizes, wanted = shared.gate_up.shape[-1:], weight.shape[-1:]
            same_sizes("shared", sizes, wanted, "the (hidden,) of `routed`")
        if shared_gate is not None and have_shapes(shared_gate, weight):
            sizes, wanted = shared_gate.shape[-2:], (1, weight.shape[-1])
            same_sizes("shared_gate", sizes, wanted, "(1, the hidden size of `routed`)")
        self.routed = routed
        self.shared = shared
        self.shared_gate = shared_gate

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        layer_idx: int,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "RoutedAndSharedMoE":
        """As `RoutedMoE.from_config`, with the shared expert; several are one wider network.

        **Raises:** as that, and `ValueError` if the configuration has no shared expert.
        """
        if integer("num_shared_experts", config.num_shared_experts, 0) < 1:
            raise ValueError(
                "`config.num_shared_experts` must be at least 1. "
                f"Got {config.num_shared_experts}: use `RoutedMoE`."
            )
        routed_key, shared_key, gate_key = jax.random.split(key, 3)
        width = config.shared_intermediate_size
        shared = FeedForward(
            config.hidden_size,
            config.num_shared_experts * config.intermediate_size if width is None else width,
            activation=activation(config.activation, config.shared_swiglu_limit),
            dtype=dtype,
            key=shared_key,
        )
        gate = None
        if boolean("use_shared_gate", config.use_shared_gate):
            hidden = config.hidden_size
            gate = uniform(gate_key, (1, hidden), hidden, shared.down.dtype)
        routed = RoutedMoE.from_config(config, layer_idx, dtype=dtype, key=routed_key)
        return cls(routed, shared, shared_gate=gate)

    @compiled
    def __call__(
        self,
        hidden_states: Float[Array, "*batch hidden"],
        input_ids: Integer[Array, "*batch"] | None = None,
        *,
        mask: Bool[Array, "*batch"] | None = None,
        routing: Routing | None = None,
        indices: Integer[Array, "*batch experts_per_token"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch hidden"], Routing]:
        """As `RoutedMoE.__call__`, with the shared expert's output added."""
        options = {"mask": mask, "routing": routing, "indices": indices, "key": key}
        output, routing = routed_sum(self.routed, hidden_states, input_ids, **options)
        tokens = zero_masked(hidden_states, routing.mask)
        shared = self.shared(tokens)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(project(tokens, self.shared_gate))
        output = output + zero_masked(shared, routing.mask).astype(output.dtype)
        return output.astype(hidden_states.dtype), routing
