"""The sharded layer compiled for eight H100: what moves, and what is held."""

import collections
import functools

import jax
import numpy as np
import pytest
from chips import compiled, devices
from collectives import collectives, sent
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from layers import DEFAULTS, Size, forward, forward_and_backward, make_layer

import braidax as bx
from braidax._parallel.exchange import Sizes
from braidax._parallel.plan import bytes_forward, working_bytes
from braidax._parallel.shards import CHUNK

SIZE = Size(512, 256, 64, 6, 8 * 1024)
PER_DEVICE = Sizes(SIZE.hidden, SIZE.intermediate, SIZE.experts, 6, SIZE.tokens // 8, 2)
GATHER, ALL_TO_ALL, RAGGED = bx.exchange.Gather(), bx.exchange.AllToAll(1.25), bx.exchange.Ragged()

every_exchange = pytest.mark.parametrize("exchange", [GATHER, ALL_TO_ALL, RAGGED], ids=repr)


@functools.cache
def program(exchange, backward, size=SIZE):
    """The routed layer in bfloat16 on 2 x 4 devices, the experts over four."""
    mesh = Mesh(np.array(devices("h100", 8)).reshape(2, 4), ("data", "expert"))
    parallel = bx.ExpertParallel(mesh, exchange=exchange, matmul=DEFAULTS["h100"])
    layer = parallel.shard(make_layer(size, "bfloat16", bx.SortedDispatch()).routed)
    function, arrays = (forward_and_backward if backward else forward)(layer)

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arrays = jax.tree.map(placed, arrays, parallel.shardings(arrays))
    spread = NamedSharding(mesh, PartitionSpec(parallel.tokens))
    tokens = jax.ShapeDtypeStruct((size.tokens, size.hidden), "bfloat16", sharding=spread)
    return compiled("h100", function, arrays, *[tokens] * (2 if backward else 1))


def moved(found):
    """Bytes per token of a device that are no sums over devices, which are of gradients."""
    tokens = (move for move in collectives(found.text) if move[0] != "all-reduce")
    return sum(sent(*move) for move in tokens) / PER_DEVICE.tokens


@pytest.mark.parametrize("exchange", [GATHER, ALL_TO_ALL], ids=repr)
def test_the_bytes_are_those_of_the_formulas(exchange):
    forward = bytes_forward(exchange, PER_DEVICE, 4)
    assert moved(program(exchange, False)) == pytest.approx(forward)
    # The transpose moves no ids. XLA widens a cotangent after it was gathered, not before.
    less = 4 * PER_DEVICE.experts_per_token
    less += 2 * PER_DEVICE.hidden if exchange == GATHER else 0
    both = 2 * forward - exchange.rows_sent(PER_DEVICE, 4) * less
    assert moved(program(exchange, True)) == pytest.approx(both)


def test_the_ragged_exchange_is_native():
    names = collections.Counter(name for name, *_ in collectives(program(RAGGED, False).text))
    # Tokens, ids and weights go, and sums return. The devices tell each other how many.
    assert names == {"ragged-all-to-all": 4, "all-gather": 1}
    names = collections.Counter(name for name, *_ in collectives(program(RAGGED, True).text))
    assert names["ragged-all-to-all"] == 7  # backward, ids do not move


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@every_exchange
def test_the_products_are_kernels_and_no_weight_moves(exchange, backward):
    found = program(exchange, backward)
    assert found.kernel() == "Mosaic"
    of_an_expert = {(2 * SIZE.intermediate, SIZE.hidden), (SIZE.intermediate, SIZE.hidden)}
    for name, shapes, _ in collectives(found.text):
        assert name == "all-reduce" or not {shape[-2:] for _, shape in shapes} & of_an_expert


@every_exchange
def test_the_planner_knows_what_is_held(exchange):
    planned = working_bytes(exchange, PER_DEVICE, 4, CHUNK)
    assert program(exchange, False).temporary == pytest.approx(planned, rel=0.1)
