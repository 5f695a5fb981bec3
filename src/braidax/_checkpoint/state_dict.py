"""A layer as named numpy arrays: the names, shapes and dtypes of transformers' saved modules."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import DTypeLike

from .._config import MoEConfig
from .._families import family_of
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .dtypes import NAMES
from .index import StoredTensors
from .layer import NamedLayer
from .leaves import leaves, to_tensors
from .load import build_moe
from .safetensors_reader import StoredTensor


def to_state_dict(
    moe: RoutedMoE | RoutedAndSharedMoE, *, model_type: str = "deepseek_v4"
) -> dict[str, np.ndarray]:
    """The arrays of a layer `moe` by the names of transformers' modules, without a prefix.

    The names and layouts are those of the family of `model_type`. In DeepSeek's:

    - `gate.weight` (experts, hidden).
    - `gate.e_score_correction_bias` (experts,), or `gate.tid2eid` int64 (vocab, experts_per_token).
    - `experts.gate_up_proj` (experts, 2 intermediate, hidden), with the gate rows first.
    - `experts.down_proj` (experts, hidden, intermediate).
    - `shared_experts.{gate,up,down}_proj.weight`, if there is a shared expert.

    Floating-point arrays keep their dtype. Leading axes, of stacked layers, are kept. A gradient of
    the layer is such a tree too: leaves that are `None` are left out.

    **Raises:** `TypeError` unless `moe` is made of this library's routers and experts, and has no
    array that the family has no name for. `ValueError` for an unknown `model_type`.

    **Source:** the modules of transformers 5.23, such as `DeepseekV4SparseMoeBlock`.

    **Example:**

        >>> import braidax as bx, jax
        >>> layer = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> bx.to_state_dict(layer)["experts.down_proj"].shape
        (8, 32, 16)
    """
    tensors = {}
    family = family_of(model_type)
    for name, where in leaves(moe, family).items():
        array = where(moe)
        if array is None:
            continue
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(
                f"`moe` must hold arrays, or None where there is nothing. "
                f"Got {type(array).__name__} for {name}."
            )
        for key, tensor in to_tensors(family, name, np.asarray(array)).items():
            # A copy: a view of a JAX array is read-only.
            tensors[family.spellings[key][-1]] = np.array(tensor, order="C")
    return tensors


def from_state_dict(
    config: MoEConfig,
    layer_idx: int,
    tensors: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
) -> RoutedMoE | RoutedAndSharedMoE:
    """The layer whose arrays are `tensors`: the inverse of `to_state_dict`, for one layer.

    - `config`: the sizes and rules of the model.
    - `layer_idx`: from 0; says whether the layer is hashed.
    - `tensors`: arrays by the names of `to_state_dict` or of a released checkpoint, without a
      prefix; no more and no fewer. They are copied.
    - `dtype`: as for `Checkpoint.moe`.

    **Raises:** `ValueError`, which names the tensor, for missing or unknown names and for wrong
    shapes or dtypes. So do expert ids out of range, numbers too large for `dtype` and a bias that
    is not finite.
    `TypeError` for anything but arrays, and for a `dtype` that cannot hold weights.

    **Source:** as for `to_state_dict`.

    **Example:**

        >>> import braidax as bx, jax
        >>> layer = bx.RoutedAndSharedMoE.from_config(bx.MoEConfig.tiny(), 2, key=jax.random.key(0))
        >>> layer = bx.from_state_dict(bx.MoEConfig.tiny(), 2, bx.to_state_dict(layer))
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"`tensors` must map names to arrays. Got {type(tensors).__name__}.")
    family = family_of(config.model_type)
    given = {name: _as_stored(name, tensor) for name, tensor in tensors.items()}
    layer = NamedLayer(StoredTensors.in_memory("tensors", given), family, "", list(given))
    return build_moe(layer, config, layer_idx, dtype)


def _as_stored(name: Any, tensor: Any) -> StoredTensor:
    if not isinstance(name, str):
        raise TypeError(f"`tensors` must map names to arrays. Got the name {name!r:.60}.")
    try:
        array = np.asarray(tensor)
    except (TypeError, RuntimeError) as error:
        try:  # torch's bfloat16, which torch cannot hand to numpy
            array = np.asarray(jax.numpy.from_dlpack(tensor))
        except Exception:
            must = "be an array that numpy or DLPack can read"
            raise TypeError(f"`{name}` must {must}: {error}") from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    dtype = NAMES.get(array.dtype, str(array.dtype))
    return StoredTensor(pathlib.Path("tensors"), name, dtype, array.shape, 0, array.nbytes, array)
