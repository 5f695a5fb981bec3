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
from .._families import Family
from .dtypes import DTYPES, FLOAT4
from .layer import (
    NamedLayer,
    check_shape,
    known_tensors,
    read_floats,
    read_table,
)
from .leaves import MATRICES, Block, from_rows, leaves, skeleton, to_tensors
from .safetensors_reader import StoredTensor
from .stored_matrix import FLOATS, StoredMatrix, stored_matrix

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
    family = layer.family
    wheres = leaves(moe, family)
    wheres = {name: where for name, where in wheres.items() if where(moe) is not None}
    known, ignored = known_tensors(layer, config, layer_idx, wheres)
    for name, why in ignored.items():
        warnings.warn(f"`{name}` is ignored: {why}.", stacklevel=3)
    # All stacks are found before one is read: a wrong shape is an error at once.
    stacks = {
        name: _find_stack(known, family, name, where(moe).shape, config.num_identity_experts)
        for name, where in wheres.items()
        if name in MATRICES
    }
    for name, where in wheres.items():
        like = where(moe)
        if name not in stacks:
            array = _read_array(known[name]["weight"], family, name, like, config)
            # A copy: JAX may share memory, which the owner of a file or of an array may change.
            array = jnp.array(array, copy=True)
        elif is_packed and name.startswith("experts."):
            parts = like.shape[1] if name == "experts.gate_up" else None
            in_turns = family.interleaved and parts is not None
            array = _packed_stack(
                stacks[name][0], parts=parts, transposed=parts is None, in_turns=in_turns
            )
        else:
            stack, is_transposed = stacks[name]
            transposed = name.endswith("down") != is_transposed
            array = _decoded_stack(stack, like.dtype, transposed=transposed)
            array = jax.device_put(from_rows(family, name, array, like.shape))
        moe = eqx.tree_at(where, moe, array)
    return moe


def _find_stack(
    known: dict[str, dict[str, StoredTensor]],
    family: Family,
    name: str,
    shape: tuple[int, ...],
    num_identity: int,
) -> tuple[_Stack, bool]:
    """The stored matrices of a block's array, which is called `name` and has `shape`; and whether
    they are stored as (size_in, size_out). A stack may have unused matrices for `num_identity`
    experts at its end."""

    def found(key: str, size: tuple[int, ...]) -> StoredMatrix:
        return stored_matrix(known[key]["weight"], known[key].get("scale"), size)

    owner, kind = name.split(".")
    *lead, rows, columns = shape
    size = (rows, columns) if kind == "gate_up" else (columns, rows)
    if name not in known:
        parts, experts = family.parts(name), range(shape[0] if owner == "experts" else 1)
        stack = [[found(part.replace("{}", str(i)), size) for part in parts] for i in experts]
        return stack, False
    if kind == "gate_up":
        size = (lead[-1] * rows, columns)
    if owner == "shared":
        return [[found(name, size)]], False
    weight = known[name]["weight"]
    transposed = family.stored_transposed and weight.dtype in FLOATS
    unused = num_identity if weight.shape[:1] == (shape[0] + num_identity,) else 0
    matrix = found(name, (shape[0] + unused, *(size[::-1] if transposed else size)))
    one = matrix._replace(shape=matrix.shape[1:])
    return [[one._replace(index=index)] for index in range(shape[0])], transposed


def _read_array(
    tensor: StoredTensor,
    family: Family,
    name: str,
    like: jax.ShapeDtypeStruct | jax.Array,
    config: MoEConfig,
) -> np.ndarray:
    """An array that is no stack of matrices."""
    if name == "table":
        check_shape(tensor, like.shape)
        return read_table(tensor, config.num_experts)
    (stored,) = to_tensors(family, name, np.broadcast_to(np.int8(0), like.shape)).values()
    array = from_rows(family, name, read_floats(tensor, stored.shape, like.dtype), like.shape)
    if name == "selection_bias" and not np.isfinite(array).all():
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


def _packed_stack(
    stack: _Stack, *, parts: int | None, transposed: bool, in_turns: bool
) -> PackedMatrices:
    """The matrices, all of one kind, as they are stored: bytes copied, nothing decoded. `parts`,
    which may not share a scale, and `transposed` are those of `PackedMatrices`. Rows of the parts
    that take turns, `in_turns`, are put behind each other."""
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
    if len(stack[0]) < (parts or 1) and (
        size % first.block[0] or (in_turns and first.block[0] > 1)
    ):
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
    if in_turns:
        order = np.arange(rows).reshape(size, -1).T.reshape(-1)
        payload, scale = payload[:, order], scale[:, order]
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
