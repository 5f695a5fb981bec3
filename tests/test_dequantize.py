"""Decoding and encoding of FP4 and FP8, against the bit fields of the formats."""

import json
import warnings

import checkpoints
import golden
import jax.numpy as jnp
import numpy as np
import pytest

from braidax._checkpoint.quantization import (
    decode_blocks,
    decode_fp4,
    decode_scale,
    encode_fp4,
    encode_fp8,
)

BF16 = np.dtype(jnp.bfloat16)
FLOATS = [np.dtype(np.float32), BF16, np.dtype(np.float16), np.dtype(np.float64)]
CODES = np.arange(256, dtype=np.uint8)
SCALES = np.arange(255, dtype=np.uint8)  # 255 is NaN, which the loader refuses


def assert_same_bits(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    bits = f"u{wanted.dtype.itemsize}"
    assert np.array_equal(found.view(bits), wanted.view(bits))


def rounded(numbers, dtype):
    """Float64 numbers as float32 and then `dtype`: the product is taken in float32."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32).astype(dtype)


def test_known_bytes():
    """0x21 is 0.5 and then 1.0: low half first. Scale 128 is 2, scale 124 an eighth."""
    payload = np.full((1, 32), 0x21, np.uint8)
    scale = np.array([[128, 124]], np.uint8)
    found = decode_fp4(payload, scale, np.dtype(np.float32))
    assert found[0, :4].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert found[0, 32:36].tolist() == [0.0625, 0.125, 0.0625, 0.125]
    codes = np.array([[0x38, 0x7E, 0x01, 0x80]], np.uint8).view(jnp.float8_e4m3fn)
    found = decode_blocks(codes, np.ones((1, 1), np.float32), (128, 128), np.dtype(np.float32))
    assert found.tolist() == [[1.0, 448.0, 2.0**-9, 0.0]] and np.signbit(found[0, 3])


def test_scales():
    wanted = (2.0 ** (SCALES.astype(np.float64) - 127)).astype(np.float32)
    for scale in (SCALES, SCALES.view(jnp.float8_e8m0fnu), wanted):
        assert_same_bits(decode_scale(scale), wanted)
    assert decode_scale(SCALES)[0] == 2.0**-127  # not flushed to zero
    assert np.isnan(decode_scale(np.array([255], np.uint8)))[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["F8_E8M0", "U8", "F32"])
def test_fp4_every_byte_at_every_scale(dtype, kind):
    payload = np.broadcast_to(CODES, (255, 256)).copy()
    exponents = np.repeat(SCALES[:, None], 16, axis=1)
    numbers = checkpoints.decode_payload(payload, "I8")
    numbers = numbers * 2.0 ** (SCALES.astype(np.float64)[:, None] - 127)
    scale = exponents.view(jnp.float8_e8m0fnu) if kind == "F8_E8M0" else exponents
    scale = decode_scale(exponents) if kind == "F32" else scale
    assert_same_bits(decode_fp4(payload, scale, dtype), rounded(numbers, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("payload", ["F8_E4M3", "F8_E5M2"])
def test_fp8_every_number_at_every_scale(dtype, payload):
    finite = CODES[(CODES & 127) <= (126 if payload == "F8_E4M3" else 123)]
    codes = np.broadcast_to(finite, (255, finite.size)).copy()
    stored = codes.view(jnp.float8_e4m3fn if payload == "F8_E4M3" else jnp.float8_e5m2)
    numbers = checkpoints.decode_payload(codes, payload)
    numbers = numbers * 2.0 ** (SCALES.astype(np.float64)[:, None] - 127)
    found = decode_blocks(stored, SCALES[:, None], (1, 256), dtype)
    assert_same_bits(found, rounded(numbers, dtype))


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_every_byte_at_every_scale_as_transformers_decodes_it(dtype):
    """255 scales times 256 bytes: the digests of what transformers gave."""
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8), (255, 256)).copy()
    scale = np.arange(255, dtype=np.uint8)[:, None]
    decoded = {"fp4": decode_fp4(codes, np.repeat(scale, 16, axis=1), dtype)}
    for kind in ("float8_e4m3fn", "float8_e5m2"):
        decoded[kind] = decode_blocks(codes.view(kind), scale, (1, 256), dtype)
    wanted = json.loads(golden.DECODED.read_text())
    for kind, numbers in decoded.items():
        assert golden.digest(numbers) == wanted[f"{kind} to {np.dtype(dtype).name}"], kind


def test_fp8_nan_stays_nan():
    codes = np.array([[0x7F, 0xFF, 0x38]], np.uint8).view(jnp.float8_e4m3fn)
    for dtype in FLOATS:
        found = decode_blocks(codes, np.full((1, 1), 127, np.uint8), (128, 128), dtype)
        assert np.isnan(found.astype(np.float32)).tolist() == [[True, True, False]]


@pytest.mark.parametrize("block", [(128, 128), (32, 32), (1, 32)])
@pytest.mark.parametrize("shape", [(256, 128), (200, 130), (3, 7), (129, 1)])
def test_blocks_cut_off_by_the_edges(block, shape):
    rng = np.random.default_rng(0)
    stored, scale, numbers = checkpoints.random_matrix(rng, shape, "F8_E4M3", "F8_E8M0", block)
    found = decode_blocks(stored, scale, block, np.dtype(np.float32))
    assert_same_bits(found, rounded(numbers, np.dtype(np.float32)))


def test_scales_that_are_no_powers_of_two():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, (4, 64), dtype=np.uint8)
    scale = rng.random((1, 1), np.float32)
    numbers = checkpoints.decode_payload(codes, "F8_E4M3").astype(np.float32)
    found = decode_blocks(codes.view(jnp.float8_e4m3fn), scale, (128, 128), np.dtype(np.float32))
    assert_same_bits(found, numbers * scale)


def test_stacks_decode_as_their_members():
    rng = np.random.default_rng(0)
    payload = rng.integers(0, 256, (3, 2, 5, 32), dtype=np.uint8)
    scale = rng.integers(100, 140, (3, 2, 5, 2), dtype=np.uint8)
    found = decode_fp4(payload, scale, BF16)
    assert_same_bits(found[1, 0], decode_fp4(payload[1, 0], scale[1, 0], BF16))


def test_overflow_is_infinite_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_fp4(np.full((1, 16), 0x77, np.uint8), np.array([[254]], np.uint8), BF16)
    assert np.isposinf(found.astype(np.float32)).all()


def nearest(numbers, values):
    """The nearest of the ascending `values`; ties to the one of even position."""
    values = np.asarray(values)
    above = np.clip(np.searchsorted(values, numbers), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    to_high = (numbers - low > high - numbers) | (
        (numbers - low == high - numbers) & (above % 2 == 0)
    )
    return np.where(to_high, high, low)


def smallest_scale(largest, limit):
    """The smallest power of two whose product with `limit` is not below `largest`."""
    scale = 2.0**-126
    while largest > limit * scale:
        scale *= 2
    return scale


@pytest.mark.parametrize("magnitude", [1e-30, 0.02, 1.0, 3e4])
def test_fp4_is_the_nearest_number_at_the_smallest_scale(magnitude):
    rng = np.random.default_rng(0)
    numbers = (magnitude * rng.standard_normal((3, 64))).astype(np.float32)
    payload, scale = encode_fp4(numbers)
    assert (payload.shape, payload.dtype) == ((3, 32), np.uint8)
    assert (scale.shape, scale.dtype) == ((3, 2), np.dtype(jnp.float8_e8m0fnu))
    groups = np.abs(numbers.reshape(3, 2, 32).astype(np.float64))
    scales = np.array([[smallest_scale(group.max(), 6.0) for group in row] for row in groups])
    assert np.array_equal(scale.astype(np.float64), scales)
    wanted = nearest(groups / scales[..., None], checkpoints.E2M1[:8]) * scales[..., None]
    found = decode_fp4(payload, scale, np.dtype(np.float32)).reshape(groups.shape)
    assert np.array_equal(np.abs(found), wanted.astype(np.float32))
    assert np.array_equal(np.signbit(found), np.signbit(numbers.reshape(groups.shape)))


@pytest.mark.parametrize("shape", [(256, 128), (200, 130), (1, 1)])
def test_fp8_is_the_nearest_number_at_the_smallest_scale(shape):
    numbers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, scale = encode_fp8(numbers)
    assert (codes.shape, codes.dtype) == (shape, np.dtype(jnp.float8_e4m3fn))
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    values = checkpoints.decode_payload(CODES[:127], "F8_E4M3")
    found = decode_blocks(codes, scale, (128, 128), np.dtype(np.float32))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = np.s_[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            magnitudes = np.abs(numbers[block].astype(np.float64))
            factor = smallest_scale(magnitudes.max(), 448.0)
            assert float(scale[row, column]) == factor
            assert np.array_equal(
                np.abs(found[block]), nearest(magnitudes / factor, values) * factor
            )


@pytest.mark.parametrize("encode, kind", [("fp4", "I8"), ("fp8", "F8_E4M3")])
def test_what_was_quantized_is_encoded_without_loss(encode, kind):
    block = (1, 32) if encode == "fp4" else (128, 128)
    rng = np.random.default_rng(0)
    _, _, numbers = checkpoints.random_matrix(rng, (200, 96), kind, "F8_E8M0", block)
    numbers = numbers.astype(np.float32)
    numbers[:, :32] *= 2.0**-60  # a block whose largest number is not the format's
    numbers[0, :32] = 0.0
    if encode == "fp4":
        found = decode_fp4(*encode_fp4(numbers), np.dtype(np.float32))
    else:
        numbers[:, :32] = 0.0
        found = decode_blocks(*encode_fp8(numbers), block, np.dtype(np.float32))
    assert np.array_equal(found, numbers)


def test_extremes_are_encoded():
    largest = np.float32(2.0**127)
    numbers = np.full((1, 32), largest, np.float32)
    numbers[0, 1:] = [0.0, *np.full(30, 1e-45)]
    for payload, scale, decode in (
        (*encode_fp4(numbers), decode_fp4),
        (*encode_fp8(numbers), lambda *args: decode_blocks(*args[:2], (128, 128), args[2])),
    ):
        found = decode(payload, scale, np.dtype(np.float64))
        assert np.isfinite(found).all() and found[0, 0] == largest
        assert (found[0, 1:] == 0).all()


def test_what_cannot_be_encoded():
    for encode in (encode_fp4, encode_fp8):
        for value in (np.nan, np.inf, 3e38):
            with pytest.raises(ValueError, match="`numbers` must be finite .* Got "):
                encode(np.full((1, 32), value, np.float32))
    with pytest.raises(ValueError, match="whole groups of 32. Got 33"):
        encode_fp4(np.zeros((1, 33), np.float32))
