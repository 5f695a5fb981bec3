"""The same numbers as the PyTorch reference, from the golden files: torch is not needed."""

import equinox as eqx
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BACKENDS, make_dispatch, output_and_vjp

import braidax as bx

pytestmark = pytest.mark.optimized  # the numbers that a user gets

BLOCKS = sorted(path.stem for path in golden.FOLDER.glob("*.npz") if "router" not in path.stem)
ROUTERS = sorted(path.stem for path in golden.FOLDER.glob("router_*.npz"))


def assert_same(actual, reference, name):
    """Within 1e-5 of the largest entry of the reference."""
    reference = np.asarray(reference, np.float64)
    bound = 1e-5 * np.abs(reference).max()
    np.testing.assert_allclose(actual, reference, rtol=0, atol=bound, err_msg=name)


def sorted_by_index(indices, weights):
    """The reference leaves the order of a token's experts open."""
    order = np.argsort(indices, axis=-1, kind="stable")
    return (np.take_along_axis(np.asarray(array), order, -1) for array in (indices, weights))


def test_all_files_are_here_and_small():
    assert len(BLOCKS) == 6 and len(ROUTERS) == 2
    assert sum(path.stat().st_size for path in golden.FOLDER.iterdir()) < 2_000_000
    for name in (*BLOCKS, *ROUTERS):
        assert golden.load(name).versions.keys() == {"torch", "transformers", "numpy"}


# Every file with the default backend, and two with each of the others.
CASES = [(name, "blocks") for name in BLOCKS]
CASES += [
    (name, backend.name)
    for name in ("top_k_clamped", "hash_sigmoid_clamped")
    for backend in BACKENDS
    if backend.name != "blocks"
]


@pytest.mark.hazard(22)
@pytest.mark.parametrize("name, backend", CASES)
def test_block(name, backend):
    case = golden.load(name)
    block = bx.from_state_dict(bx.MoEConfig(**case.config), case.layer_idx, case.tensors)
    block = eqx.tree_at(lambda b: b.routed.dispatch, block, make_dispatch(bx, backend))
    arrays = map(jnp.asarray, (case.hidden_states, case.input_ids, case.cotangent))
    output, routing, gradient, hidden_states_gradient = output_and_vjp(block, *arrays)
    indices, weights = sorted_by_index(routing.indices, routing.weights)
    wanted_indices, wanted_weights = sorted_by_index(case.indices, case.weights)
    np.testing.assert_array_equal(indices, wanted_indices)
    assert_same(weights, wanted_weights, "weights")
    assert_same(output, case.output, "output")
    assert_same(hidden_states_gradient, case.hidden_states_gradient, "hidden states")
    named = bx.to_state_dict(gradient)
    # Not a parameter of the reference; ours is a leaf, and its gradient exactly 0.
    assert not named.pop("gate.e_score_correction_bias", np.zeros(1)).any()
    assert named.keys() == case.gradients.keys()
    for tensor, reference in case.gradients.items():
        assert_same(named[tensor], reference, tensor)


@pytest.mark.hazard(22)
@pytest.mark.parametrize("name", ROUTERS)
def test_router_at_a_released_size(name):
    case = golden.load(name)
    config = bx.MoEConfig(**case.config)
    weight, bias, hidden_states = golden.router_inputs(case.config)
    router = bx.TopKRouter(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_token,
        scaling_factor=config.scaling_factor,
        key=jax.random.key(0),
    )
    router = eqx.tree_at(
        lambda r: (r.gate.weight, r.score_correction_bias), router, (jnp.asarray(weight), bias)
    )
    routing = router(jnp.asarray(hidden_states))
    indices, weights = sorted_by_index(routing.indices, routing.weights)
    # In float64, when the file was made: no choice is left to rounding.
    assert case.smallest_gap > 1e-6
    np.testing.assert_array_equal(indices, case.indices)
    assert_same(weights, case.weights, name)
