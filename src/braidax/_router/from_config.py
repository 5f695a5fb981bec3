"""The router that a configuration asks for."""

from jaxtyping import DTypeLike, PRNGKeyArray

from .. import hash_tables
from .._checks import integer, positive_integer
from .._config import MoEConfig, score_function
from .base import AbstractRouter
from .gate import GateOptions
from .hash import HashRouter
from .top_k import TopKRouter


def router_from_config(
    config: MoEConfig, layer_idx: int, *, dtype: DTypeLike | None, key: PRNGKeyArray
) -> AbstractRouter:
    """The router of layer `layer_idx`: by an MD5 table salted with the layer index if it is one of
    the first `config.num_hash_layers`, by score otherwise."""
    num_identity = integer("num_identity_experts", config.num_identity_experts, 0)
    num_experts = positive_integer("num_experts", config.num_experts) + num_identity
    sizes = (config.hidden_size, num_experts, config.num_experts_per_token)
    gate: GateOptions = {
        "score_function": score_function(config.score_function),
        "normalize": config.normalize,
        "scaling_factor": config.scaling_factor,
        "temperature": config.temperature,
        "use_bias": config.use_gate_bias,
        "dtype": dtype,
    }
    if config.is_hash_layer(layer_idx):
        if config.vocab_size is None:
            raise ValueError("`config.vocab_size` must be given for a hash layer. Got None.")
        table = hash_tables.md5(config.vocab_size, *sizes[1:], salt=layer_idx)
        return HashRouter(*sizes, table=table, key=key, **gate)
    return TopKRouter(
        *sizes,
        num_groups=config.num_groups,
        num_selected_groups=config.num_selected_groups,
        group_score=config.group_score,
        key=key,
        **gate,
    )
