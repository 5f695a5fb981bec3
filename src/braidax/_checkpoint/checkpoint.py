"""`Checkpoint`: the layers of a released or saved model, and what its files hold."""

import operator
import os

from jaxtyping import DTypeLike

from .._config import MoEConfig
from .._families import Family, family_of
from .._families.family import Layers
from .._moe import RoutedAndSharedMoE, RoutedMoE
from .counting import count_checkpoint
from .index import StoredTensors
from .layer import NamedLayer, find_layer
from .load import build_moe
from .summary import CheckpointSummary


class Checkpoint:
    """The files of a model: a folder, an index (`*.safetensors.index.json`) or one file.

    Every family of the table in the guide is read, in the spellings of its releases and of
    transformers. The experts may be stored one by one or stacked, in floating point, FP8 or packed
    FP4. The configuration says which family it is. The dtype and geometry of a tensor say how it
    is stored.

    **Source:** the `model.safetensors` of each release; transformers' modules and
    `conversion_mapping.py`.

    **Example:** `save_moe` writes such a file.

        >>> import braidax as bx, jax, tempfile
        >>> config = bx.MoEConfig.tiny()
        >>> layer = bx.RoutedAndSharedMoE.from_config(config, 2, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bx.save_moe(f"{folder}/layer.safetensors", layer, 2)
        ...     checkpoint = bx.Checkpoint(folder)
        ...     loaded = checkpoint.moe(2, config=config)
        ...     checkpoint.summary().parameters
        14088
        >>> bool((loaded.routed.experts.down == layer.routed.experts.down).all())
        True
    """

    def __init__(self, path: str | os.PathLike[str]):
        """**Arguments:** `path`: in a folder, the index decides which files are meant. Without an
        index, all its `.safetensors` files are.

        **Raises:** `FileNotFoundError` if there is nothing to read, `ValueError` for a malformed
        index or file.
        """
        self._path = path
        self._tensors = StoredTensors(path)
        self._found: dict[str, Layers] = {}

    def _layers(self, family: Family) -> Layers:
        if family.model_type not in self._found:
            self._found[family.model_type] = family.layers_of(self._tensors.files)
        return self._found[family.model_type]

    def _layer(self, layer_idx: int, config: MoEConfig | None) -> tuple[NamedLayer, MoEConfig, int]:
        if config is None:
            config = MoEConfig.from_hf(self._tensors.folder)
        layer_idx, family = operator.index(layer_idx), family_of(config.model_type)
        layer = find_layer(self._tensors, family, self._layers(family), layer_idx)
        return layer, config, layer_idx

    def moe(
        self,
        layer_idx: int,
        *,
        config: MoEConfig | None = None,
        dtype: DTypeLike | None = None,
    ) -> RoutedMoE | RoutedAndSharedMoE:
        """The mixture-of-experts layer `layer_idx`, a `RoutedMoE` where it has no shared expert.

        **Arguments:**

        - `layer_idx`: from 0.
        - `config`: the sizes and rules of the model; by default the `config.json` beside the
            files.
        - `dtype`: of the weights, which are decoded one by one into their final arrays; by default
            JAX's own. With `"packed"`, the experts stay as stored, FP4 or FP8, and are decoded
            when they are used; the other weights are float32. The selection bias is float32
            always, the table int32.

        **Raises:** `FileNotFoundError` if there is no configuration. `ValueError` for anything
        missing, truncated, out of range or of another size than the configuration says. The
        message names file and tensor, what was expected and what was found. `TypeError` for a
        `dtype` that cannot hold weights.

        **Warns:** for a tensor that the layer does not compute with: a bias for image tokens, a
        bias beside a table.
        """
        return build_moe(*self._layer(layer_idx, config), dtype)

    def summary(self, layer_idx: int | None = None) -> CheckpointSummary:
        """Sizes, dtypes and routers of the checkpoint, or of layer `layer_idx` alone, as a table.

        Headers are read, and hash tables; no weights. The experts per token are the columns of a
        layer's hash table, or what the `config.json` beside the files says.

        **Raises:** `ValueError` naming file and tensor for files that are damaged or absent, and
        for a layer that does not exist. `TypeError` for a `layer_idx` that is no integer.
        """
        return count_checkpoint(self._path, self._tensors, layer_idx)


def load_moe(
    path: str | os.PathLike[str],
    layer_idx: int,
    *,
    config: MoEConfig | None = None,
    dtype: DTypeLike | None = None,
) -> RoutedMoE | RoutedAndSharedMoE:
    """One layer of a checkpoint: `Checkpoint(path).moe(layer_idx, config=config, dtype=dtype)`.

    **Raises:** `FileNotFoundError`, `ValueError` and `TypeError`, as `Checkpoint.moe` does.

    **Source:** as for `Checkpoint`.

    **Example:**

        >>> import braidax as bx, jax, tempfile
        >>> config = bx.MoEConfig.tiny()
        >>> layer = bx.RoutedAndSharedMoE.from_config(config, 2, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bx.save_moe(f"{folder}/layer.safetensors", layer, 2)
        ...     loaded = bx.load_moe(folder, 2, config=config, dtype="bfloat16")
        >>> loaded.routed.experts.down.dtype
        dtype(bfloat16)
    """
    # Not by `Checkpoint.moe`: a warning points at the caller of what calls `build_moe`.
    return build_moe(*Checkpoint(path)._layer(layer_idx, config), dtype)
