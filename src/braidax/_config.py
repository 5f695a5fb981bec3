"""`MoEConfig`: every number that fixes a mixture-of-experts layer, and the released presets."""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax.core import Tracer
from jaxtyping import Array, Float

from ._checks import integer, one_line
from ._config_file import fields_from_hf, read_config
from ._experts import activations
from ._matmul import Activation
from ._scoring import sqrt_softplus

_ScoreFunction = Callable[[Float[Array, "..."]], Float[Array, "..."]]
# The released names of score functions.
_SCORE_FUNCTIONS: dict[str, _ScoreFunction] = {
    "sqrtsoftplus": sqrt_softplus,
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
}
_CLAMPED = {"swiglu": activations.swiglu, "gpt_oss": activations.gpt_oss}
_ACTIVATIONS: dict[str, Callable[..., Activation]] = {
    **_CLAMPED,
    "geglu": activations.geglu,
    "relu_squared": activations.relu_squared,
}

# `None` already means "no clamp", so "not given" needs a value of its own.
_SAME_AS_SWIGLU_LIMIT: Any = enum.Enum("default", "same_as_swiglu_limit")["same_as_swiglu_limit"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The numbers of one model's mixture-of-experts layers: a record.

    Nothing is checked here. The constructors of the layers check what they are given.

    - `hidden_size`, `intermediate_size`: features of a token, and inside one expert.
    - `num_experts`, `num_experts_per_token`: routed experts, and how many each token goes to.
    - `vocab_size`: token ids; needed only by hash layers.
    - `num_shared_experts`: experts that every token passes.
    - `score_function`: a released name, `"sqrtsoftplus"`, `"sigmoid"` or `"softmax"`.
    - `normalize`: whether the selected scores are divided by their sum. DeepSeek models with
      softmax scores have `False`.
    - `scaling_factor`: multiplies the weights, last.
    - `num_groups`, `num_selected_groups`: groups of experts, and how many of them a token may use.
    - `num_hash_layers`: the first so many layers are routed by token id.
    - `swiglu_limit`, `shared_swiglu_limit`: clamp the activations of the routed experts and of the
      shared one (by default the same value, fixed at construction); `None` is no clamp.
    - `temperature`: divides the logits (`gate_temp` in DeepSeek-V4.1).
    - `group_score`: what ranks a group, `"top2"` or `"max"`, as for `TopKRouter`.
    - `activation`: of all experts: `"swiglu"`, `"geglu"`, `"gpt_oss"` or `"relu_squared"`.
      `swiglu_limit` clamps the first and the third.
    - `use_gate_bias`, `use_expert_bias`: trained biases of the gate, and of the experts.
    - `shared_intermediate_size`: features inside the shared expert; `None` is `intermediate_size`
      for each of `num_shared_experts`.
    - `use_shared_gate`: a gate on the shared expert, as for `RoutedAndSharedMoE`.
    - `latent_size`: features of the routed experts' projection; `None` is no projection.
    - `num_identity_experts`: experts that hand a token on, beside the `num_experts` that compute.
    - `weighted_input`: the weights multiply the experts' input, as in Llama-4. No layer of this
      library does so; the guide shows a dispatch that does, and how to open such a layer.
    - `dense_layers`: the layers that are no mixtures.
    - `model_type`: the family, whose names tensors have in files.

    **Source:** the `config.json` of each release, and the class of transformers that reads it.

    **Example:**

        >>> import braidax as bx
        >>> config = bx.MoEConfig(hidden_size=64, intermediate_size=32, num_experts=8,
        ...     num_experts_per_token=2, vocab_size=256, num_hash_layers=1, swiglu_limit=10.0)
        >>> config.shared_swiglu_limit
        10.0
        >>> bx.MoEConfig.deepseek_v3().num_selected_groups
        4
        >>> flash, pro = bx.MoEConfig.deepseek_v4_flash(), bx.MoEConfig.deepseek_v4_pro()
        >>> flash.num_experts, pro.scaling_factor
        (256, 2.5)
        >>> bx.MoEConfig.deepseek_v4_1_flash().num_hash_layers, bx.MoEConfig.tiny().hidden_size
        (0, 32)
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    vocab_size: int | None = None
    num_shared_experts: int = 1
    score_function: str = "sqrtsoftplus"
    normalize: bool = True
    scaling_factor: float | int = 1.0
    num_groups: int = 1
    num_selected_groups: int = 1
    num_hash_layers: int = 0
    swiglu_limit: float | int | None = None
    shared_swiglu_limit: float | int | None = _SAME_AS_SWIGLU_LIMIT
    temperature: float | int = 1.0
    group_score: Literal["top2", "max"] = "top2"
    activation: str = "swiglu"
    use_gate_bias: bool = False
    use_expert_bias: bool = False
    shared_intermediate_size: int | None = None
    use_shared_gate: bool = False
    latent_size: int | None = None
    num_identity_experts: int = 0
    weighted_input: bool = False
    dense_layers: tuple[int, ...] = ()
    model_type: str = "deepseek_v4"

    def __post_init__(self):
        if self.shared_swiglu_limit is _SAME_AS_SWIGLU_LIMIT:
            object.__setattr__(self, "shared_swiglu_limit", self.swiglu_limit)

    def is_hash_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx`, from 0, is one of the `num_hash_layers` first.

        The answer decides which parameters exist, so `layer_idx` must be static, not traced.

        **Raises:** `TypeError` for anything but an integer, `ValueError` below 0.

        **Example:**

            >>> import braidax as bx
            >>> [bx.MoEConfig.tiny().is_hash_layer(layer_idx) for layer_idx in range(4)]
            [True, True, False, False]
        """
        num_hash_layers = integer("num_hash_layers", self.num_hash_layers, 0)
        return _static(layer_idx) < num_hash_layers

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx`, from 0, is a mixture of experts: none of `dense_layers`.

        **Raises:** `TypeError` for anything but an integer, `ValueError` below 0.

        **Example:**

            >>> import braidax as bx
            >>> [bx.MoEConfig.deepseek_v3().is_moe_layer(layer_idx) for layer_idx in range(5)]
            [False, False, False, True, True]
        """
        return _static(layer_idx) not in self.dense_layers and self.num_experts != 0

    @classmethod
    def from_hf(cls, source: Any) -> "MoEConfig":
        """Read a Hugging Face configuration by its `model_type`.

        `source` is the path of a `config.json`, its folder, the parsed dictionary, or a
        configuration object of transformers. The keys of a nested `text_config` win over the keys
        around it, all but a known `model_type`. A key that is missing, or null, means what it means
        to the code of that `model_type`. A `swiglu_limit` that is not positive is no clamp.

        **Raises:** `FileNotFoundError` for a missing file and `TypeError` for another `source`.
        `ValueError`, naming file and key, for an unknown `model_type`, and for anything that is
        missing, contradictory or not supported. Values out of range are errors when a layer is
        built of them.

        **Source:** the released `config.json` of each model, and the `configuration_*.py` of
        transformers 5.23.

        **Example:**

            >>> import braidax as bx
            >>> bx.MoEConfig.from_hf({"model_type": "deepseek_v4", "hidden_size": 64,
            ...     "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
            ...     "vocab_size": 256, "mlp_layer_types": ["hash_moe", "moe"],
            ... }).num_hash_layers
            1
        """
        origin, raw = read_config(source)
        try:
            return cls(**fields_from_hf(raw))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{origin}: {one_line(str(error))}") from error

    # The presets' positional arguments are in the order of the fields above.

    @classmethod
    def deepseek_v3(cls) -> "MoEConfig":
        """DeepSeek-V3: 256 experts in 8 groups, sigmoid scores, no hash layers, no clamp."""
        config = cls(7168, 2048, 256, 8, 129280, 1, "sigmoid", True, 2.5, 8, 4)
        return dataclasses.replace(config, dense_layers=(0, 1, 2), model_type="deepseek_v3")

    @classmethod
    def deepseek_v4_flash(cls) -> "MoEConfig":
        """DeepSeek-V4-Flash: 256 experts, 6 a token, the first 3 layers hashed."""
        return cls(
            4096, 2048, 256, 6, 129280, scaling_factor=1.5, num_hash_layers=3, swiglu_limit=10.0
        )

    @classmethod
    def deepseek_v4_pro(cls) -> "MoEConfig":
        """DeepSeek-V4-Pro: 384 experts, 6 a token, the first 3 layers hashed."""
        return cls(
            7168, 3072, 384, 6, 129280, scaling_factor=2.5, num_hash_layers=3, swiglu_limit=10.0
        )

    @classmethod
    def deepseek_v4_1_flash(cls) -> "MoEConfig":
        """DeepSeek-V4.1-Flash: 384 experts, 6 a token, no hash layers."""
        config = cls(5120, 2304, 384, 6, 129280, scaling_factor=1.5, swiglu_limit=10.0)
        return dataclasses.replace(config, model_type="deepseek_v41")

    @classmethod
    def tiny(cls) -> "MoEConfig":
        """A byte-sized DeepSeek-V4 for tests and examples: 8 experts, 2 a token, 2 hash layers."""
        return cls(32, 16, 8, 2, 256, scaling_factor=1.5, num_hash_layers=2, swiglu_limit=10.0)


def score_function(name: str) -> _ScoreFunction:
    """The score function of a released `name`. **Raises:** `ValueError` for an unknown name."""
    return _named("score_function", _SCORE_FUNCTIONS, name)


def activation(name: str, limit: float | None) -> Activation:
    """The activation of this `name`. **Raises:** `ValueError` for an unknown name."""
    make = _named("activation", _ACTIVATIONS, name)
    return make(limit) if name in _CLAMPED else make()


def _named(argument: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"`{argument}` must be one of {', '.join(table)}. Got {name!r:.60}.")
    return table[name]


def _static(layer_idx: int) -> int:
    if isinstance(layer_idx, Tracer):
        raise TypeError(f"`layer_idx` must be static, not traced. Got {layer_idx}.")
    return integer("layer_idx", layer_idx, 0)
