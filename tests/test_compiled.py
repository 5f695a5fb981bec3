"""What JAX and XLA make of the block: operations, memory, traces, and code for other platforms."""

import dataclasses
import itertools
import math
import re
from functools import partial

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import optax
import pytest
from cases import (
    EXPERTS,
    HIDDEN,
    ROUTERS,
    SLOTS,
    assert_close,
    make_block,
    make_dispatch,
    make_inputs,
    slow_but_one,
)

import braidax as bx

sorted_backends = pytest.mark.parametrize("backend", slow_but_one(["blocks", "ragged"]))


def top_k_block(sizes, backend, **options):
    """A block of `(hidden, intermediate, experts, experts_per_token)`."""
    hidden, intermediate, experts, slots = sizes
    router = bx.TopKRouter(hidden, experts, slots, key=jax.random.key(0))
    activation = bx.activations.swiglu(10.0)
    stack = bx.Experts(experts, hidden, intermediate, activation=activation, key=jax.random.key(1))
    return bx.RoutedMoE(router, stack, dispatch=make_dispatch(bx, backend, **options))


def functions(block):
    """Parameters, the forward pass as a function of them and the tokens, and its gradient."""
    parameters, static = eqx.partition(block, eqx.is_inexact_array)

    def forward(parameters, *inputs):
        return eqx.combine(parameters, static)(*inputs)[0]

    def loss(*arguments):
        return jnp.sum(jnp.sin(forward(*arguments)))

    return parameters, forward, jax.grad(loss, argnums=(0, 1))


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    inner = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, inner)):
            if isinstance(value, inner):
                yield from equations(getattr(value, "jaxpr", value))


def scatters_and_one_hots(function, *arguments, sizes):
    """Scatters as `(primitive, shape it writes to)`, and the shapes with an axis of experts and one
    of tokens or rows that hold more than one number for each token and expert."""
    tokens, experts, slots = sizes
    found = list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))
    scatters = [
        (equation.primitive.name, equation.outvars[0].aval.shape)
        for equation in found
        if "scatter" in equation.primitive.name
    ]
    shapes = {variable.aval.shape for equation in found for variable in equation.outvars}
    assert (tokens, experts) in shapes
    large = {
        shape
        for shape in shapes
        if experts in shape
        and {tokens, tokens * slots} & set(shape)
        and math.prod(shape) > tokens * experts
    }
    return sorted(scatters), large


TOKENS = 37  # Like no other size here, nor a product of them.
ORDER = ("scatter", (TOKENS * SLOTS,))
GATE = ("scatter-add", (TOKENS, EXPERTS))


@sorted_backends
@pytest.mark.parametrize("kind", ROUTERS)
def test_no_scatter_add_of_rows_and_no_one_hot(kind, backend):
    """One scatter writes the inverse of a permutation: every entry once, nothing added. The other
    is the gate's: to the scores, from the weights of the experts that were chosen, a number each.
    Selection instead of it made the gate four times slower on a CPU: XLA computes the cotangent
    of a weight again for every expert."""
    hidden_states, input_ids = make_inputs((TOKENS,))
    parameters, forward, gradient = functions(make_block(bx, kind, backend))
    for function, wanted in ((forward, [ORDER]), (gradient, [ORDER, GATE])):
        arguments = (parameters, hidden_states, input_ids)
        scatters, large = scatters_and_one_hots(
            function, *arguments, sizes=(TOKENS, EXPERTS, SLOTS)
        )
        assert scatters == wanted
        assert large == set()


def test_scatters_and_one_hots_are_seen():
    """In the dense dispatch, where every expert computes every token."""
    hidden_states, input_ids = make_inputs((TOKENS,))
    parameters, _, gradient = functions(make_block(bx, "top_k", "dense"))
    arguments = (parameters, hidden_states, input_ids)
    scatters, large = scatters_and_one_hots(gradient, *arguments, sizes=(TOKENS, EXPERTS, SLOTS))
    assert scatters != [ORDER, GATE]
    assert any(len(shape) == 3 for shape in large)


def temporary_and_output_bytes(function, *shapes):
    analysis = jax.jit(function).lower(*shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes, analysis.output_size_in_bytes


def shapes_of(tree, *leading):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype), tree
    )


def test_memory_of_the_default_backend():
    hidden, intermediate, experts, slots = sizes = (512, 256, 64, 6)
    tokens = 1024
    parameters, forward, gradient = functions(top_k_block(sizes, backend="blocks"))
    arguments = shapes_of(parameters), jax.ShapeDtypeStruct((tokens, hidden), jnp.float32)
    row, token, pre_activations = (
        4 * count * width
        for count, width in (
            (tokens * slots, hidden),
            (tokens, hidden),
            (tokens * slots, 2 * intermediate),
        )
    )
    # The tokens in the order of the experts, and what the experts make of them. Pre-activations
    # would not fit in.
    temporary, _ = temporary_and_output_bytes(forward, *arguments)
    assert temporary <= 2 * row + 2 * token < 2 * row + pre_activations / 2

    # The gradients are outputs: counted, so that there is one copy of them and no second.
    temporary, output = temporary_and_output_bytes(gradient, *arguments)
    weights = 4 * experts * 3 * hidden * intermediate
    assert temporary + output <= 3 * (row + pre_activations) + weights


@pytest.mark.parametrize("tokens", slow_but_one([32, 1024, 4]))
def test_bfloat16_weights_are_widened_one_expert_at_a_time(tokens):
    """XLA on a CPU would widen the whole stack to float32 before the loop: twice its own size.
    With 4 tokens inference takes single rows, with 32 tiles, with 1024 the loop over blocks."""
    hidden, intermediate, experts, slots = sizes = (256, 512, 64, 6)
    block = bx.cast(top_k_block(sizes, backend="blocks"), jnp.bfloat16)
    parameters, forward, gradient = functions(block)
    inputs = jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16)
    stack = 2 * experts * 3 * hidden * intermediate
    temporary, _ = temporary_and_output_bytes(forward, shapes_of(parameters), inputs)
    assert temporary < stack / 2

    # The gradients are added up in float32, as large as a widened stack: there is no second.
    temporary, _ = temporary_and_output_bytes(gradient, shapes_of(parameters), inputs)
    saved = 4 * tokens * slots * (hidden + 2 * intermediate)
    assert temporary <= 2 * stack + saved


def loss_of_stack(forward, stacked, hidden_states):
    """Residual layers in a scan, their parameters stacked."""

    def layer(hidden_states, parameters):
        return hidden_states + forward(parameters, hidden_states), None

    return jnp.sum(jnp.sin(jax.lax.scan(layer, hidden_states, stacked)[0]))


@sorted_backends
def test_remat_keeps_no_pre_activations(backend):
    """Of layers in a scan. One layer alone recomputes them right after it dropped them, and where
    layers are unrolled XLA may schedule that first: no less at the peak."""
    layers, tokens, sizes = 3, 256, (64, 128, 4, 2)
    temporary = {}
    for remat in (False, True):
        parameters, forward, _ = functions(top_k_block(sizes, backend=backend, remat=remat))
        arguments = shapes_of(parameters, layers), jax.ShapeDtypeStruct((tokens, 64), jnp.float32)
        gradient = jax.grad(partial(loss_of_stack, forward))
        temporary[remat], _ = temporary_and_output_bytes(gradient, *arguments)
    pre_activations = 4 * tokens * 2 * 2 * 128
    assert temporary[False] - temporary[True] >= 0.9 * layers * pre_activations


@sorted_backends
def test_remat_under_vmap(backend):
    """Per-example gradients against the dense backend."""
    block, dense = make_block(bx, "top_k", backend), make_block(bx, "top_k", "dense")
    routed = dataclasses.replace(block.routed, dispatch=make_dispatch(bx, backend, remat=True))
    hidden_states, _ = make_inputs((3, 6))

    @eqx.filter_jit
    def per_example(block):
        loss = lambda block, x: jnp.sum(jnp.sin(block(x)[0]))  # noqa: E731
        return jax.vmap(lambda x: eqx.filter_grad(loss)(block, x))(hidden_states)

    got = per_example(bx.RoutedAndSharedMoE(routed, block.shared))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(per_example(dense)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("kind", ROUTERS)
def test_training_steps_are_traced_once(kind):
    model = make_block(bx, kind, "blocks")
    optimizer = optax.adamw(1e-2, mask=bx.decay_mask)
    optimizer_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    hidden_states, input_ids = make_inputs()
    traces = []

    @eqx.filter_jit
    def step(model, optimizer_state, hidden_states, input_ids):
        traces.append(None)

        def loss(model):
            output, routing = model(hidden_states, input_ids)
            return jnp.mean((output - hidden_states) ** 2), routing

        (value, routing), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        parameters = eqx.filter(model, eqx.is_inexact_array)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        model = bx.rebalance(eqx.apply_updates(model, updates), routing, rate=1e-3)
        return model, optimizer_state, value

    values = []
    for _ in range(3):
        model, optimizer_state, value = step(model, optimizer_state, hidden_states, input_ids)
        values.append(float(value))
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert len(traces) == 1


@pytest.mark.parametrize("backend, remat", [("blocks", False), ("ragged", True)])
def test_the_backward_pass_keeps_neither_rows_nor_outputs(backend, remat):
    """Of 40 tokens with 3 experts each, what has a row for each assignment is narrow or inner."""
    block = top_k_block((12, 7, 5, 3), backend, remat=remat)
    parameters, forward, _ = functions(block)
    _, transpose = jax.vjp(forward, parameters, jnp.ones((40, 12)))
    kept = [leaf.shape for leaf in jax.tree.leaves(transpose) if leaf.size and len(leaf) == 120]
    assert [shape for shape in kept if shape[1:]] == ([] if remat else [(120, 14)])


@pytest.mark.optimized
def test_rows_are_gathered_again_and_not_held_by_the_compiler():
    """Three more layers hold three more pre-activations, as large as the rows, and some tokens."""
    hidden, rows = 64, 4 * 1024

    def temporary(number):
        blocks = [top_k_block((hidden, 32, 8, 4), "blocks") for _ in range(number)]
        parameters, static = eqx.partition(blocks, eqx.is_inexact_array)

        def loss(parameters, tokens):
            for block in eqx.combine(parameters, static):
                tokens = tokens + block(tokens)[0]
            return jnp.sum(jnp.sin(tokens))

        tokens = jnp.ones((rows // 4, hidden))
        compiled = jax.jit(jax.grad(loss)).lower(parameters, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * rows * hidden)

    assert temporary(4) - temporary(1) < 3 * 2.3  # 2.9 with rows, 3.9 with outputs as well


@sorted_backends
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowering_for_other_platforms(platform, backend):
    """To StableHLO, which is as far as a machine without the device gets: `ragged` hands the
    products on as they are, two of them and their four transposes; `blocks` is loops."""
    hidden_states, input_ids = make_inputs()
    for dtype in (jnp.float32, jnp.bfloat16):
        block = bx.cast(make_block(bx, "top_k", backend), dtype)
        parameters, forward, gradient = functions(block)
        arguments = (parameters, hidden_states.astype(dtype), input_ids)
        for function, products in ((forward, 2), (gradient, 6)):
            traced = jax.jit(function).trace(*arguments)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            ragged = len(re.findall(r'= "?chlo\.ragged_dot"?[ (]', text))
            assert ragged == (products if backend == "ragged" else 0)
            assert ("stablehlo.while" in text) or backend == "ragged"


@pytest.mark.parametrize("platform, products", [("tpu", 2), ("cuda", 0), ("cpu", 0)])
def test_the_default_kernel_is_chosen_when_a_program_is_lowered(platform, products):
    """Traced on a CPU, exported for another platform: `ragged_dot` on a TPU, loops elsewhere."""
    parameters, forward, gradient = functions(bx.top_k_moe(12, 7, 5, 3, key=jax.random.key(0)))
    for function, factor in ((forward, 1), (gradient, 3)):
        exported = jax.export.export(jax.jit(function), platforms=[platform])
        text = exported(parameters, jnp.ones((9, 12))).mlir_module()
        assert text.count('stablehlo.composite "chlo.ragged_dot"') == factor * products


def test_auto_says_what_it_chooses():
    auto = bx.matmul.Auto()
    assert auto.chosen("tpu") == bx.matmul.Ragged()
    assert auto.chosen("cuda") == auto.chosen("cpu") == bx.matmul.Blocks()
    assert auto.chosen() == auto.chosen(jax.default_backend())


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_first_eager_call_is_one_compilation(kind):
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    # Sizes like those of no other test: nothing of it has been compiled before.
    sizes = (11, 7, 3)
    router = make_router_of(kind, sizes)
    experts = bx.Experts(sizes[1], sizes[0], 5, key=jax.random.key(1))
    block = bx.RoutedMoE(router, experts)
    hidden_states, input_ids = jax.random.normal(jax.random.key(2), (13, 11)), jnp.arange(13)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        output, _ = block(hidden_states, input_ids)
        number = len(compiled)
        block(hidden_states + 0, input_ids)
    finally:
        listen = None
    assert output.shape == (13, 11) and number == 1


def make_router_of(kind, sizes):
    hidden, experts, slots = sizes
    if kind == "hash":
        table = bx.hash_tables.md5(13, experts, slots)
        return bx.HashRouter(hidden, experts, slots, table=table, key=jax.random.key(0))
    return bx.TopKRouter(hidden, experts, slots, key=jax.random.key(0))


@pytest.mark.slow
def test_a_jitted_call_can_be_exported_donated_and_run_without_jit():
    block = bx.top_k_moe(12, 7, 5, 3, key=jax.random.key(0))
    hidden_states, _ = make_inputs((6,))
    desired, _ = block(hidden_states)
    with jax.disable_jit():
        assert_close(block(hidden_states)[0], desired)
    exported = jax.export.export(jax.jit(lambda x: block(x)[0]))(hidden_states)
    assert_close(exported.call(hidden_states), desired)
    donated = jnp.array(hidden_states)
    assert_close(jax.jit(lambda x: block(x)[0], donate_argnums=0)(donated), desired)
    assert donated.is_deleted()


@pytest.mark.parametrize("backend", slow_but_one(["blocks", "ragged", "dense"]))
def test_a_program_is_exported_once_for_any_number_of_tokens(backend, unchecked):
    """`unchecked`, as a symbolic size is no `int` to the annotations."""
    block = make_block(bx, "hash", backend)

    def call(hidden_states, input_ids):
        output, routing = block(hidden_states, input_ids)
        limited = bx.over_capacity(routing, 2)
        return output, bx.expert_load(limited), bx.batch_balance_loss(routing)

    (tokens,) = jax.export.symbolic_shape("tokens")
    shapes = ((tokens, HIDDEN), jnp.float32), ((tokens,), jnp.int32)
    exported = jax.export.export(jax.jit(call))(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    for number in (1, 9, 300):
        inputs = make_inputs((number,))
        (output, load, loss), desired = exported.call(*inputs), call(*inputs)
        assert_close(output, desired[0])
        assert load.tolist() == desired[1].tolist()
        assert_close(loss, desired[2])


@pytest.mark.slow
def test_a_gradient_is_exported_for_any_number_of_tokens(unchecked):
    parameters, _, gradient = functions(make_block(bx, "top_k", "blocks"))
    (tokens,) = jax.export.symbolic_shape("tokens")
    shape = jax.ShapeDtypeStruct((tokens, HIDDEN), jnp.float32)
    exported = jax.export.export(jax.jit(gradient))(parameters, shape)
    hidden_states, _ = make_inputs((9,))
    got, desired = exported.call(parameters, hidden_states), gradient(parameters, hidden_states)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(desired), strict=True):
        assert_close(a, b)
