"""What `Tokamax` asks of tokamax, which stands in here: it has kernels for accelerators only."""

import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import braidax as bx
from braidax._matmul import ragged


@pytest.mark.parametrize(
    "capability, dtype, asked",
    [
        (None, "bfloat16", "float32"),  # no GPU
        ("9.0", "bfloat16", "float32"),  # Hopper
        ("10.3", "bfloat16", "bfloat16"),  # Blackwell: its kernel has no float32 results
        ("10.0", "float32", "float32"),
    ],
)
def test_a_result_of_16_bits_where_float32_raises(monkeypatch, capability, dtype, asked):
    calls = []

    def ragged_dot_general(*operands, implementation, **options):
        calls.append((implementation, options["preferred_element_type"]))
        return jax.lax.ragged_dot_general(*operands, **options)

    fake = ModuleType("tokamax")
    fake.ragged_dot_general = ragged_dot_general
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    device = capability and SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(ragged, "attached_gpu", lambda: device)
    rows, weight = jnp.ones((4, 2), dtype), jnp.ones((2, 2, 3), dtype)
    sizes, wide = jnp.array([3, 1], jnp.int32), jnp.dtype("float32")
    kernel = bx.matmul.Tokamax(implementation="mosaic")
    product = kernel.multiply(rows, weight, sizes, transposed=False, out_dtype=wide)
    sums = kernel.outer(rows, rows, sizes, out_dtype=wide)
    assert product.dtype == sums.dtype == wide
    assert product.tolist() == [[2.0] * 3] * 4 and sums[:, 0, 0].tolist() == [3.0, 1.0]
    bx.matmul.Tokamax().multiply(rows, weight, sizes, transposed=False, out_dtype=wide)
    assert calls == [("mosaic", asked), ("mosaic", asked), (None, asked)]
