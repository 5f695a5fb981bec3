"""Takes protections out of a copy of the library, one at a time, and sees that tests notice.

`nox -s mutants`, or `python tests/mutants.py [number ...]`. A mutant whose tests all pass has
survived: the protection it lacks is held by no test.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / "src" / "braidax"
TESTS_FAILED = 1  # pytest's exit status; 2 and up are errors of collection or usage.


class Mutant(NamedTuple):
    """`protection` holds because of `old`, once in `file`; with `new` in its place, one of
    `tests` must fail."""

    protection: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "rows are not kept for the backward pass",
        "_dispatch/rows.py",
        "_Rows() if leaf is rows else leaf",
        "leaf",
        ("compiled::the_backward_pass_keeps_neither_rows_nor_outputs",),
    ),
    Mutant(
        "rows are gathered when the cotangent is there",
        "_dispatch/rows.py",
        " | (cotangent[:1].sum() > 0)",
        "",
        ("compiled::rows_are_gathered_again_and_not_held_by_the_compiler",),
    ),
    Mutant(
        "an unknown id gives NaN",
        "_router/base.py",
        "weights = undefined_where(undefined, zero_masked(weights, mask))",
        "weights = zero_masked(weights, mask)",
        ("hazards_run_time::ids_outside_the_table_poison_their_tokens_only[blocks]",),
    ),
    Mutant(
        "ids are compared before they are narrowed",
        "_checks.py",
        "if jnp.result_type(array).itemsize < 4 else array",
        "if True else array",
        ("hazards_call::wide_ids_are_not_wrapped_into_the_vocabulary",),
    ),
    Mutant(
        "narrow ids are widened first",
        "_checks.py",
        "if jnp.result_type(array).itemsize < 4 else array",
        "if False else array",
        ("hazards_call::narrow_ids_of_a_large_vocabulary",),
    ),
    Mutant(
        "ids of another shape are refused",
        "_router/base.py",
        "if jnp.shape(array) != tuple(batch):",
        "if False:",
        ("hazards_call::a_call_is_refused_alike_eager_and_under_jit",),
    ),
    Mutant(
        "a replaced table may not name experts that are not",
        "_router/hash.py",
        "known & valid.all(axis=-1)",
        "known",
        ("hazards_run_time::a_table_replaced_by_one_of_other_experts_poisons_its_tokens_only",),
    ),
    Mutant(
        "checks raise for unknown ids",
        "_dispatch/base.py",
        "jnp.isnan(routing.weights),",
        "jnp.isnan(routing.weights) & False,",
        ("hazards_run_time::checks_raise_for_an_id_outside_the_table[jit]",),
    ),
    Mutant(
        "an unknown id in padding is no error",
        "_router/base.py",
        "undefined = ~defined[..., None] & (indices < scores.shape[-1])",
        "undefined = ~defined[..., None]",
        ("hazards_run_time::checks_change_nothing_else[hash]",),
    ),
    Mutant(
        "a replayed index of no expert gives NaN",
        "_replay.py",
        "weights = undefined_where(~defined[..., None], routing.weights)",
        "weights = routing.weights",
        ("moe::replaying_an_index_of_no_expert_poisons_its_token_only[-1-blocks]",),
    ),
    Mutant(
        "a chosen index of no expert gives NaN",
        "_router/base.py",
        "valid.all(axis=-1)",
        "valid.all(axis=-1) | True",
        ("replay::an_index_of_no_expert_poisons_its_token_only",),
    ),
    Mutant(
        "padding is selected away, not multiplied away",
        "_routing.py",
        "jnp.where(mask[..., None], array, 0)",
        "array * mask[..., None]",
        ("hazards_experts::padding_that_holds_nan_reaches_no_gradient[top_k-blocks]",),
    ),
    Mutant(
        "a NaN score is pinned, whatever its sign",
        "_router/top_k.py",
        "corrected = jnp.where(undefined, jnp.inf, corrected)",
        "",
        ("hazards_top_k::one_nan_score_of_either_sign_poisons_its_row_only",),
    ),
    Mutant(
        "minus infinity comes last",
        "_router/top_k.py",
        "corrected = jnp.where(jnp.isneginf(logits), -jnp.inf, corrected)",
        "",
        ("routers::minus_infinity_loses_to_an_underflowed_score",),
    ),
    Mutant(
        "groups left out are -inf",
        "_router/top_k.py",
        "jnp.where(kept[..., None], grouped, -jnp.inf)",
        "jnp.where(kept[..., None], grouped, 0)",
        ("hazards_top_k::groups_with_negative_biased_scores",),
    ),
    Mutant(
        "a bias of another shape is refused",
        "_router/top_k.py",
        "if bias.shape != (num_experts,):",
        "if False:",
        ("hazards_construction::arrays_replaced_by_something_that_does_not_fit",),
    ),
    Mutant(
        "the gate multiplies at the highest precision",
        "_router/gate.py",
        "precision=jax.lax.Precision.HIGHEST",
        "precision=jax.lax.Precision.DEFAULT",
        ("hazards_top_k::every_gate_multiplies_in_float32_at_the_highest_precision",),
    ),
    Mutant(
        "sqrt_softplus has a closed form below zero",
        "_scoring.py",
        "jnp.finfo(x.dtype).eps / 4",
        "jnp.finfo(x.dtype).tiny",
        ("scoring::second_derivative", "hazards_scores::derivatives_of_second_order_in_both_modes"),
    ),
    Mutant(
        "the normalizer scales before it divides",
        "_scoring.py",
        "scale = jnp.ldexp(jnp.ones_like(largest), -exponent)",
        "scale = jnp.ones_like(largest)",
        ("scoring::normalizer_gradient",),
    ),
    Mutant(
        "the slope at the limit is the full one",
        "_experts/activations.py",
        "jnp.where(gate > limit, limit, gate), up",
        "jnp.minimum(gate, limit), up",
        ("hazards_precision::the_clamp_at_every_limit",),
    ),
    Mutant(
        "a gate far below has slope 0, not NaN",
        "_experts/activations.py",
        "_LOWEST_GATE = -1000.0",
        "_LOWEST_GATE = -3.4e38",
        ("hazards_precision::the_clamp_at_every_limit[float32]",),
    ),
    Mutant(
        "a block's gradient leaves its neighbours' rows out",
        "_matmul/block_loop.py",
        "return jnp.where(self.live(), self.take(array, array.dtype), 0)",
        "return self.take(array, array.dtype)",
        ("hazards_experts::a_broken_token_reaches_itself_and_its_experts",),
    ),
    Mutant(
        "duplicates add",
        "_dispatch/dense.py",
        "by_expert.at[token, indices].add(",
        "by_expert.at[token, indices].set(",
        ("hazards_experts::an_expert_named_twice_is_the_expert_with_both_weights[dense]",),
    ),
    Mutant(
        "padding is not counted",
        "_routing.py",
        "indices if mask is None else jnp.where(mask[..., None], indices, num_experts)",
        "indices",
        ("hazards_state::shards_are_summed_before_the_sign",),
    ),
    Mutant(
        "rows of nobody are cleared",
        "_matmul/network.py",
        "return jnp.where(owned[:, None], rows, 0)",
        "return rows",
        ("moe::what_a_kernel_leaves_is_cleared",),
    ),
    Mutant(
        "a capacity keeps the first to come",
        "_routing.py",
        "left_out = (place >= capacity)",
        "left_out = (place > capacity)",
        ("capacity::what_is_left_out_against_a_recount",),
    ),
    Mutant(
        "softmax obeys `normalize` as every score function does",
        "_router/gate.py",
        "normalized(weights) if self.normalize else weights",
        "weights",
        ("routers::softmax_weights_are_normalized_by_default",),
    ),
    Mutant(
        "the sign is decided in integers",
        "_sign_bias.py",
        "balanced = (load == quotient) & (remainder == 0)",
        "mean = load.astype(jnp.float32).mean(axis=-1, keepdims=True)\n"
        "    below, balanced = load < mean, load == mean",
        ("hazards_state::the_sign_is_that_of_exact_fractions",),
    ),
    Mutant(
        "weight decay leaves the bias alone",
        "_filters.py",
        'if path and getattr(path[0], "name", None) in untrained:',
        "if False:",
        ("filters::ten_steps_leave_bias_and_table_bit_for_bit[adamw-inexact]",),
    ),
)


def node_id(name: str) -> str:
    """`moe::x` is `tests/test_moe.py::test_x`."""
    file, function = name.split("::")
    return f"tests/test_{file}.py::test_{function}"


def mutate(source: str, mutant: Mutant) -> str:
    """`source` without the protection."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} must hold {mutant.old!r} once.")
    return source.replace(mutant.old, mutant.new)


def run_tests(source: pathlib.Path, tests: list[str]) -> tuple[int, str]:
    """Exit status and output of pytest with the library from `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += map(node_id, tests)
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@contextlib.contextmanager
def copied_library(mutant: Mutant | None) -> Iterator[pathlib.Path]:
    """A folder for PYTHONPATH that holds the library, without one protection or with them all."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "braidax"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            path = copy / mutant.file
            path.write_text(mutate(path.read_text(), mutant))
        yield pathlib.Path(folder)


def verdict_of(mutant: Mutant) -> tuple[str, str]:
    """`killed`, `SURVIVED` or `BROKEN` (an error that is not a failed test), with the output."""
    with copied_library(mutant) as source:
        status, output = run_tests(source, list(mutant.tests))
    return {TESTS_FAILED: "killed", 0: "SURVIVED"}.get(status, "BROKEN"), output


def problem_without_mutation(tests: list[str]) -> str | None:
    """Why a failed test would prove nothing: another library is imported, or tests fail anyway."""
    with copied_library(None) as source:
        where = "import braidax, sys; sys.exit(not braidax.__file__.startswith(sys.argv[1]))"
        environment = {**os.environ, "PYTHONPATH": str(source)}
        command = [sys.executable, "-c", where, str(source)]
        if subprocess.run(command, env=environment, cwd=ROOT).returncode != 0:
            return "the copy of the library is not the one that Python imports"
        status, output = run_tests(source, tests)
    return f"{output}\nthe tests fail without a mutation" if status != 0 else None


def main(numbers: list[int]) -> int:
    """Run the mutants of these numbers, or all; 1 if one was not killed."""
    chosen = [(n, MUTANTS[n - 1]) for n in numbers or range(1, len(MUTANTS) + 1)]
    problem = problem_without_mutation(sorted({t for _, mutant in chosen for t in mutant.tests}))
    if problem is not None:
        print(problem)
        return 1
    failures = 0
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        verdicts = pool.map(verdict_of, [mutant for _, mutant in chosen])
        for (number, mutant), (verdict, output) in zip(chosen, verdicts, strict=True):
            print(f"{number:2}  {verdict:8}  {mutant.protection}  ({mutant.file})", flush=True)
            if verdict != "killed":
                failures += 1
                print(output)
    print(f"{len(chosen) - failures} of {len(chosen)} mutants killed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
