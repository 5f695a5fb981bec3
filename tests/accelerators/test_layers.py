"""The whole layer, forward and backward, compiled for chips that are not here.

`nox -s accelerators` runs this, and prints the table of docs/measured.md at the end.
"""

import pytest
from layers import SIZES, program

import braidax as bx

# XLA for a TPU schedules for speed as long as memory lasts.
FACTOR = {"h100": 1.15, "a100": 1.15, "v5p": 3}

every_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
every_size = pytest.mark.parametrize("size", SIZES)
every_chip = pytest.mark.parametrize("chip", FACTOR)
both_directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])


def limit(chip, size, dtype, backward):
    """Bytes of temporary memory that a layer may need.

    Forward: rows and their outputs in float32, and two activations of the shared expert. Backward:
    the same of their cotangents, the pre-activations, and a few matrices of one expert."""
    item = {"bfloat16": 2, "float32": 4}[dtype]
    rows = size.rows * size.hidden * (item + 4)
    shared = size.tokens * 3 * size.intermediate * 4
    expert = 3 * size.hidden * size.intermediate
    if backward:
        return 2 * (rows + shared) + size.rows * 2 * size.intermediate * 4 + 4 * expert * 4
    # A TPU's kernel wants the other layout of gate and up. Backward, that copy has room in the
    # buffers of the gradients.
    return rows + shared + (size.experts * expert * 2 // 3 * item if chip == "v5p" else 0)


def is_dense(found, size):
    """Whether an array holds every row for every expert."""
    return found.largest() >= size.rows * size.experts * size.intermediate


@both_directions
@every_dtype
@every_size
@every_chip
def test_the_layer_does_the_work_of_its_assignments(chip, size, dtype, backward, record_property):
    found, sizes = program(chip, size, dtype, backward), SIZES[size]
    direction = "forward + backward" if backward else "forward"
    record_property("program", (size, chip, dtype, direction, found.temporary, found.kernel()))
    assert not is_dense(found, sizes)
    assert found.temporary < FACTOR[chip] * limit(chip, sizes, dtype, backward)
    if size == "V4-Flash" and dtype == "bfloat16" and chip != "v5p":
        assert found.temporary < (4e9 if backward else 1.2e9)  # beside 12.9 GB of gradients
    wanted = {
        "h100": "Mosaic" if dtype == "bfloat16" else "Blocks",
        "a100": "Blocks",
        "v5p": "Ragged",
    }
    assert found.kernel() == wanted[chip]


def test_a_dense_product_is_seen():
    """`ragged_dot` on an NVIDIA GPU: the same checks have to fail."""
    found, sizes = program("h100", "small", "bfloat16", False, bx.matmul.Ragged()), SIZES["small"]
    assert is_dense(found, sizes)
    assert found.temporary > 10 * limit("h100", sizes, "bfloat16", False)
    assert found.kernel() == "dense"
