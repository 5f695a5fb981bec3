"""The planner against the table of section 5 of the reference, computed there by other code."""

import pytest

import braidax as bx
from braidax._parallel.exchange import Sizes

FLASH = Sizes(4096, 2048, 256, 6, 8192, 2)


def test_destinations_of_v4_flash():
    sizes = (2, 4, 8, 16, 32, 64)
    means = [FLASH.destinations(size) for size in sizes]
    assert [round(mean, 2) for mean in means] == [1.97, 3.30, 4.44, 5.18, 5.60, 5.83]


def test_v4_flash_by_hand():
    plan = bx.plan(bx.MoEConfig.deepseek_v4_flash(), 64, 8192, 450e9, 400e12)
    rows = {(row.size, type(row.exchange).__name__): row for row in plan.rows}
    assert len(rows) == 3 * 7
    # 7 other devices; 4096 x (2 bytes there + 4 back) + 6 slots x 8 bytes.
    gather = rows[8, "Gather"]
    assert gather.bytes_per_token == 7 * (4096 * 6 + 48)
    assert gather.communication_seconds == gather.bytes_per_token / 450e9
    assert gather.weight_bytes == 32 * 3 * 4096 * 2048 * 2
    # 302 MFLOP per token.
    assert gather.compute_seconds == pytest.approx(302e6 / 400e12, rel=1e-3)
    # 8192 x 6 / 8 x 1.25 = 7680 slots for each pair.
    assert rows[8, "AllToAll"].bytes_per_token == 7 * 7680 / 8192 * (4096 * 6 + 48)
    assert rows[1, "Ragged"].bytes_per_token == 0
    lines = str(plan).splitlines()
    assert len(lines) == 2 + len(rows) and len(set(map(len, lines))) == 1


@pytest.mark.parametrize(
    "argument, value", [("devices", 0), ("bandwidth", -1.0), ("flops", float("nan"))]
)
def test_mistakes_are_named(argument, value):
    arguments = {"devices": 8, "tokens_per_device": 8, "bandwidth": 1e9, "flops": 1e12}
    with pytest.raises(ValueError, match=f"`{argument}`"):
        bx.plan(bx.MoEConfig.tiny(), **{**arguments, argument: value})
