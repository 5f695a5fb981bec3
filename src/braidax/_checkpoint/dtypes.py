"""The element types of safetensors files, and how numpy holds them."""

import jax.numpy as jnp
import numpy as np

FLOAT4 = np.dtype(jnp.float4_e2m1fn)
SCALE = np.dtype(jnp.float8_e8m0fnu)

# Two 4-bit numbers share a byte in a file, the first one in the low half; numpy needs a byte each.
PACKED = "F4"

# In the order in which the writer lays tensors out: wide elements first keep every one aligned.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": SCALE,
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    PACKED: FLOAT4,
}
NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def stored_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of `array` as a file holds them, two 4-bit numbers in one: uint8, one axis."""
    array = np.ascontiguousarray(array)
    data = array.reshape(-1).view(np.uint8)
    return data[::2] & 15 | data[1::2] << 4 if array.dtype == FLOAT4 else data


def size_in_bits(name: str) -> int:
    """Bits of one element of the type called `name` in a file."""
    return 4 if name == PACKED else 8 * DTYPES[name].itemsize
