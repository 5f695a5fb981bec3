"""The planner against the table of section 5 of the reference, computed there by other code."""

import itertools

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


def test_experts_that_hand_a_token_on_by_hand():
    """LongCat-Flash: of 768 experts 256 hold no weights, so a token computes 8 of its 12."""
    longcat = {
        "model_type": "longcat_flash",
        "hidden_size": 6144,
        "expert_ffn_hidden_size": 2048,
        "n_routed_experts": 512,
        "zero_expert_num": 256,
        "moe_topk": 12,
    }
    plan = bx.plan(bx.MoEConfig.from_hf(longcat), 8, 4096, 450e9, 400e12)
    gather, all_to_all, ragged = (row for row in plan.rows if row.size == 8)
    assert gather.weight_bytes == 64 * 3 * 6144 * 2048 * 2
    assert gather.compute_seconds == pytest.approx(8 * 3 * 2 * 6144 * 2048 / 400e12)
    # A row carries all 12 slots, and the slots of a pair are fixed before anything is routed.
    row = 6144 * 6 + 12 * 8
    assert gather.bytes_per_token == all_to_all.bytes_per_token == 7 * row
    # A device has 64 of the 768: 12 draws miss all of them with 704/768 x 703/767 x ...
    none = 1.0
    for drawn in range(12):
        none *= (704 - drawn) / (768 - drawn)
    assert ragged.bytes_per_token == pytest.approx(7 * (1 - none) * row)


def test_destinations_by_enumeration():
    """Every pair of 4 experts on two devices and of 2 that have none."""
    pairs = list(itertools.combinations(range(6), 2))
    reached = [len({expert // 2 for expert in pair if expert < 4}) for pair in pairs]
    mean = sum(reached) / len(pairs)
    assert Sizes(8, 8, 4, 2, 1, 4, identity=2).destinations(2) == pytest.approx(mean)
    computed = sum(expert < 4 for pair in pairs for expert in pair) / len(pairs)
    assert Sizes(8, 8, 4, 2, 1, 4, identity=2).computed() == pytest.approx(computed)


@pytest.mark.parametrize(
    "argument, value", [("devices", 0), ("bandwidth", -1.0), ("flops", float("nan"))]
)
def test_mistakes_are_named(argument, value):
    arguments = {"devices": 8, "tokens_per_device": 8, "bandwidth": 1e9, "flops": 1e12}
    with pytest.raises(ValueError, match=f"`{argument}`"):
        bx.plan(bx.MoEConfig.tiny(), **{**arguments, argument: value})
