"""One training step and the held-out pass: pure functions of state and windows."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._balance import expert_load, max_violation
from .filters import decay_mask, rebalance, trainable
from .language_model import LanguageModel
from .settings import Settings


class State(eqx.Module):
    """What a step changes and a checkpoint holds.

    `step` counts the updates made and `skipped` the steps that made none: their sum is the number
    of steps done.
    """

    model: LanguageModel
    optimizer_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]


class StepMetrics(eqx.Module):
    """Loss in nats per byte and, for each routed layer, MaxVio of this step's windows.

    `skipped` is the number of steps skipped since the run began.
    """

    loss: Float[Array, ""]
    max_violation: Float[Array, " _"]
    skipped: Int[Array, ""]


def make_schedule(settings: Settings, peak: float) -> optax.Schedule:
    """Linear warm-up over a tenth of the steps, then a cosine from `peak` to a tenth of it."""
    warmup_steps = max(1, settings.steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup_steps,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(settings.steps, warmup_steps + 1),
        end_value=0.1 * peak,
    )


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW under the schedule, gradients clipped to norm 1."""
    schedule = make_schedule(settings, settings.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.01, mask=decay_mask),
    )


def initial_state(settings: Settings, optimizer: optax.GradientTransformation) -> State:
    """A model from `settings.seed` and its optimizer state."""
    model = LanguageModel(settings, key=jax.random.key(settings.seed))
    optimizer_state = optimizer.init(eqx.filter(model, trainable(model)))
    # Two arrays: a buffer cannot be donated twice.
    return State(model, optimizer_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def next_byte_loss(
    model: LanguageModel, windows: Int[Array, "batch _"]
) -> tuple[Float[Array, ""], tuple]:
    """Mean cross entropy in nats per byte, computed in float32, and the routings."""
    logits, routings = model(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), windows[:, 1:]
    )
    return jnp.mean(losses), routings


def make_step(
    settings: Settings, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[State, StepMetrics]]:
    """`step(windows, state) -> (state, metrics)`, compiled. The old state's memory is reused.

    A step whose loss, gradient or new parameters are not finite is skipped: parameters, optimizer
    state and selection bias stay as they are, bit for bit, and `skipped` goes up by one.
    """
    balance_rate = make_schedule(settings, settings.balance_rate)

    @eqx.filter_jit(donate="all-except-first")
    def step(windows, state):
        spec = trainable(state.model)
        trained, fixed = eqx.partition(state.model, spec)

        def loss_of(trained):
            return next_byte_loss(eqx.combine(trained, fixed), windows)

        (loss, routings), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, trained)
        model = eqx.combine(eqx.apply_updates(trained, updates), fixed)
        if routings:
            # After the optimizer and outside the gradient (Wang et al. 2024, arXiv:2408.15664).
            model = rebalance(model, routings, balance_rate(state.step))
        # The sum and not the gradients: where only their norm overflows, clipping gives zeros.
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients))
        finite = _all_finite((loss, squares, model))
        updated = State(model, optimizer_state, state.step + 1, state.skipped)
        unchanged = eqx.tree_at(lambda old: old.skipped, state, state.skipped + 1)
        state = _choose(finite, updated, unchanged)
        violations = jnp.array([max_violation(expert_load(routing)) for routing in routings])
        return state, StepMetrics(loss, violations, state.skipped)

    return step


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _choose(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """`yes` or `no`, chosen on the device: asking the host would make every step wait for it."""
    arrays, static = eqx.partition(yes, eqx.is_array)
    others = eqx.filter(no, eqx.is_array)
    chosen = jax.tree.map(lambda a, b: jnp.where(condition, a, b), arrays, others)
    return eqx.combine(chosen, static)


@eqx.filter_jit
def evaluate(
    model: LanguageModel, windows: Int[Array, "batch _"]
) -> tuple[Float[Array, ""], tuple[Int[Array, " experts"], ...]]:
    """Mean loss of `windows` in nats per byte and the load of every routed layer."""
    loss, routings = next_byte_loss(model, windows)
    return loss, tuple(expert_load(routing) for routing in routings)
