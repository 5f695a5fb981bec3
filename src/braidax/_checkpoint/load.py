"""From tensors, in files or in memory, to a running block."""

import mmap
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike, Float

from .._checks import floating_dtype
from .._config import MoEConfig
from .._experts.packed import PackedMatrices
from .dtypes import DTYPES, FLOAT4
from .layer import NamedLayer, check_shape, known_tensors, read_floats, read_table
from .leaves import MATRICES, Block, leaves, skeleton
from .safetensors_reader import StoredTensor
from .stored_matrix import StoredMatrix, stored_matrix

PACKED = "packed"

# For each expert the matrices whose rows, one after the other, are its own.
_Stack = list[list[StoredMatrix]]


def build_moe(
    layer: NamedLayer, config: MoEConfig, layer_idx: int, dtype: DTypeLike | None
) -> Block:
    """The block of `layer`: see `Checkpoint.moe`. To be called by what the user calls."""
    is_packed = isinstance(dtype, str) and dtype == PACKED
    dtype = floating_dtype("dtype", jnp.float32 if is_packed else dtype)
    moe = skeleton(config, layer_idx, dtype)
    known, ignored = known_tensors(layer, config, layer_idx)
    for name, why in ignored.items():
        warnings.warn(f"`{name}` is ignored: {why}.", stacklevel=3)
    wheres = leaves(moe)
    # All stacks are found before one is read: a wrong shape is an error at once.
    stacks = {
        name: _find_stack(known, name, where(moe).shape)
        for name, where in wheres.items()
        if name.startswith(("experts.", "shared."))
    }
    for name, where in wheres.items():
        like = where(moe)
        if name not in stacks:
            array = _read_router(known[name]["weight"], name, like, config)
            # A copy: JAX may share memory, which the owner of a file or of an array may change.
            array = jnp.array(array, copy=True)
        elif is_packed and name.startswith("experts."):
            parts = 2 if name == "experts.gate_up" else None
            array = _packed_stack(stacks[name], parts=parts, transposed=parts is None)
        else:
            array = _decoded_stack(stacks[name], like.dtype, transposed=name.endswith("down"))
            array = jax.device_put(array.reshape(like.shape))
        moe = eqx.tree_at(where, moe, array)
    return moe


def _find_stack(
    known: dict[str, dict[str, StoredTensor]], name: str, shape: tuple[int, ...]
) -> _Stack:
    """The stored matrices of a block's array, which is called `name` and has `shape`."""

    def found(key: str, size: tuple[int, ...]) -> StoredMatrix:
        return stored_matrix(known[key]["weight"], known[key].get("scale"), size)

    owner, kind = name.split(".")
    *_, rows, columns = shape
    size = (rows, columns) if kind == "gate_up" else (columns, rows)
    if owner == "experts" and name in known:
        matrix = found(name, (shape[0], len(MATRICES[kind]) * size[0], size[1]))
        one = matrix._replace(shape=matrix.shape[1:])
        return [[one._replace(index=index)] for index in range(shape[0])]
    owners = ["shared"] if owner == "shared" else [f"experts.{i}" for i in range(shape[0])]
    return [[found(f"{owner}.{matrix}", size) for matrix in MATRICES[kind]] for owner in owners]


def _read_router(
    tensor: StoredTensor, key: str, like: jax.ShapeDtypeStruct, config: MoEConfig
) -> np.ndarray:
    if key == "table":
        check_shape(tensor, like.shape)
        return read_table(tensor, config.num_experts)
    array = read_floats(tensor, like.shape, like.dtype)
    if key == "selection_bias" and not np.isfinite(array).all():
        raise tensor.mistake("be finite", "NaN or infinity")
    return array


def _decoded_stack(
    stack: _Stack, dtype: np.dtype, *, transposed: bool
) -> Float[np.ndarray, "experts a b"]:
    """The matrices in `dtype`, (size_out, size_in) or `transposed`, without a second copy."""
    rows, columns = sum(part.shape[0] for part in stack[0]), stack[0][0].shape[1]
    array = _aligned_empty(
        (len(stack), *((columns, rows) if transposed else (rows, columns))), dtype
    )
    for parts, matrix in zip(stack, np.swapaxes(array, 1, 2) if transposed else array, strict=True):
        start = 0
        for part in parts:
            for strip, numbers in part.decoded(dtype):
                matrix[start + strip.start : start + strip.stop] = numbers
            start += part.shape[0]
    return array


def _packed_stack(stack: _Stack, *, parts: int | None, transposed: bool) -> PackedMatrices:
    """The matrices, all of one kind, as they are stored: bytes copied, nothing decoded. `parts`,
    which may not share a scale, and `transposed` are those of `PackedMatrices`."""
    first = stack[0][0]
    if first.format == "float" or first.block is None:
        raise first.weight.mistake(
            'be FP4 or FP8 with scales, for `dtype="packed"`', "floating point"
        )
    for matrix in (matrix for members in stack for matrix in members):
        if _kind(matrix) != _kind(first):
            must = f'be stored as {first.weight.name} is, for `dtype="packed"`: {_kind(first)}'
            raise matrix.weight.mistake(must, _kind(matrix))
    rows = sum(part.shape[0] for part in stack[0])
    size = rows // (parts or 1)
    if len(stack[0]) < (parts or 1) and size % first.block[0]:
        must = f"have blocks of {first.block[0]} rows that gate and up do not share"
        raise first.weight.mistake(must, f"an intermediate size of {size}")
    payload, scale = (
        _aligned_empty((len(stack), rows, array.shape[1]), array.dtype) for array in _packed(first)
    )
    for members, *matrix in zip(stack, payload, scale, strict=True):
        start = 0
        for part in members:
            for array, own in zip(matrix, _packed(part), strict=True):
                array[start : start + len(own)] = own
            start += part.shape[0]
    number = FLOAT4 if first.format == "fp4" else DTYPES[first.format]
    arrays = (jax.device_put(payload), jax.device_put(scale))
    return PackedMatrices(*arrays, number.name, first.block, parts, transposed)


def _kind(matrix: StoredMatrix) -> tuple[str, tuple[int, int] | None, bool]:
    return matrix.format, matrix.block, matrix.scale is not None and matrix.scale.dtype == "F32"


def _packed(matrix: StoredMatrix) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of every row, and its scales: uint8 exponents, or the bits of float32."""
    scale, block, num_rows = matrix.scales(), matrix.block, matrix.shape[0]
    assert scale is not None and block is not None
    scale = scale.view(np.uint32) if scale.dtype == np.float32 else scale
    scale = np.repeat(scale, min(block[0], num_rows), axis=0)[:num_rows]
    return matrix.payload().view(np.uint8), scale


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory at the start of a page.

    `jax.device_put` on a CPU takes aligned arrays over. It copies others, which would need their
    memory twice."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    pages = mmap.mmap(-1, max(count * dtype.itemsize, 1))
    return np.frombuffer(pages, dtype, count).reshape(shape)
