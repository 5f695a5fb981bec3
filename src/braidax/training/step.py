"""One training step: a pure function of windows and state."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._balance import expert_load, max_violation
from .._bias_update import rebalance
from .._filters import decay_mask, trainable
from .._routing import Routing
from .model import LanguageModel
from .settings import Settings


class State(eqx.Module):
    """What a step changes and a checkpoint holds: `step` updates made, `skipped` steps without."""

    model: LanguageModel
    optimizer_state: PyTree
    step: Int[Array, ""]
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


def initial_state(settings: Settings) -> State:
    """A model from `settings.seed` and its optimizer state."""
    model = LanguageModel(settings, key=jax.random.key(settings.seed))
    optimizer_state = make_optimizer(settings).init(eqx.filter(model, trainable(model)))
    # Two arrays: a buffer cannot be donated twice.
    return State(model, optimizer_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def next_byte_loss(
    model: LanguageModel, windows: Int[Array, "batch _"]
) -> tuple[Float[Array, ""], tuple[Routing, ...]]:
    """Mean cross entropy of `windows` in nats per byte, in float32, and the routings."""
    logits, routings = model(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), windows[:, 1:]
    )
    return jnp.mean(losses), routings


def make_step(
    settings: Settings, optimizer: optax.GradientTransformation | None = None
) -> Callable[..., tuple[State, Float[Array, ""], Float[Array, " layers"]]]:
    """`step(windows, state) -> (state, loss, MaxVio of each routed layer)`, compiled.

    The memory of the old state is reused. A step whose loss, gradient or update is not finite
    changes nothing, bit for bit, but adds one to `skipped`.
    """
    optimizer = make_optimizer(settings) if optimizer is None else optimizer
    balance_rate = make_schedule(settings, settings.balance_rate)

    @eqx.filter_jit(donate="all-except-first")
    def step(windows, state):
        trained, fixed = eqx.partition(state.model, trainable(state.model))

        def loss_of(trained):
            return next_byte_loss(eqx.combine(trained, fixed), windows)

        (loss, routings), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, trained)
        model = eqx.combine(eqx.apply_updates(trained, updates), fixed)
        if routings:
            # After the optimizer and outside the gradient (Wang et al. 2024, arXiv:2408.15664).
            model = rebalance(model, routings, balance_rate(state.step))
        updated = State(model, optimizer_state, state.step + 1, state.skipped)
        unchanged = eqx.tree_at(lambda old: old.skipped, state, state.skipped + 1)
        # `optax.apply_if_finite` sees only the entries of the gradient. Here its norm and the
        # updates may not overflow either. The host is not asked: every step would wait for it.
        leaves = jax.tree.leaves((gradients, updates))
        finite = jnp.isfinite(loss + sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
        arrays, static = eqx.partition(updated, eqx.is_array)
        old_arrays = eqx.filter(unchanged, eqx.is_array)
        arrays = jax.tree.map(lambda new, old: jnp.where(finite, new, old), arrays, old_arrays)
        violations = [max_violation(expert_load(routing)) for routing in routings]
        return eqx.combine(arrays, static), loss, jnp.array(violations)

    return step


@eqx.filter_jit
def evaluate(
    model: LanguageModel, windows: Int[Array, "batch _"]
) -> tuple[Float[Array, ""], tuple[Int[Array, " experts"], ...], tuple[Routing, ...]]:
    """Mean loss of `windows` in nats per byte, and load and routing of every routed layer."""
    loss, routings = next_byte_loss(model, windows)
    return loss, tuple(expert_load(routing) for routing in routings), routings
