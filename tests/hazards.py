"""The inputs that break mixture-of-experts layers in the field, and the tests that hold each one.

One row a case. `exception` names the backends that cannot hold it, as their docstrings say.
`conftest.py` prints the table at the end of a run.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Hazard(NamedTuple):
    """`tests` are `file::function`, the file without `test_` and `.py`."""

    number: int
    outcome: str
    tests: tuple[str, ...]
    exception: str = ""

    def node_ids(self) -> tuple[str, ...]:
        """The tests as pytest names them, parameters left out."""
        pairs = (name.split("::") for name in self.tests)
        return tuple(f"tests/test_{file}.py::test_{function}" for file, function in pairs)


def _row(number: int, outcome: str, tests: str, exception: str = "") -> Hazard:
    return Hazard(number, outcome, tuple(tests.split()), exception)


HAZARDS = (
    # Construction.
    _row(
        1,
        "sizes below 1, or more experts per token than experts: ValueError",
        """routers::construction_errors config::value_out_of_range
        hazards_construction::experts_that_make_no_sense""",
    ),
    _row(
        2,
        "an unknown score function: ValueError that lists the known ones",
        "routers::construction_errors config::every_score_function_is_known",
    ),
    _row(
        3,
        "a scaling factor, limit or rate that is not finite, or not above 0: ValueError",
        """hazards_construction::a_scaling_factor_that_is_not_finite_and_positive
        hazards_construction::experts_that_make_no_sense
        hazards_construction::no_limit_is_no_clamp balance::wrong_updates_are_named""",
    ),
    _row(
        4,
        "a selection bias of another shape or dtype, or not finite in a file: an error",
        """hazards_construction::arrays_replaced_by_something_that_does_not_fit
        state_dict::refused_tensors routers::a_nan_bias_is_loud""",
    ),
    _row(
        5,
        "a table of another shape, or transposed: ValueError with both shapes",
        """hazards_construction::a_table_that_does_not_fit_is_named routers::table_errors
        state_dict::refused_tensors""",
    ),
    _row(
        6,
        "a float or bool table: TypeError; any integers are stored as int32",
        """hazards_construction::a_table_that_does_not_fit_is_named
        hazards_construction::a_table_of_any_integers_is_stored_as_int32
        hazards_construction::arrays_replaced_by_something_that_does_not_fit""",
    ),
    _row(
        7,
        "a table entry of no expert: ValueError with its row, column and value",
        """hazards_construction::a_table_that_does_not_fit_is_named
        hash_tables::from_array_rejects
        hazards_run_time::a_table_replaced_by_one_of_other_experts_poisons_its_tokens_only""",
    ),
    _row(
        8,
        "groups that do not divide, or hold too few experts: ValueError",
        "routers::construction_errors config::experts_per_token_fit_in_the_selected_groups",
    ),
    _row(
        9,
        "expert weights that do not fit together or the router: ValueError",
        """hazards_construction::arrays_replaced_by_something_that_does_not_fit
        hazards_construction::fewer_experts_than_the_router_has
        hazards_call::layers_stacked_for_a_scan_are_not_called_as_one
        moe::parts_of_different_sizes_are_refused
        hazards_precision::weights_of_another_dtype_than_the_tokens""",
    ),
    # Calls.
    _row(
        10,
        "a hash layer without ids: ValueError; a layer that selects by score ignores ids",
        """hazards_call::a_call_is_refused_alike_eager_and_under_jit
        hazards_call::a_router_by_score_ignores_ids moe::call_errors""",
    ),
    _row(
        11,
        "ids of any other shape than the tokens: ValueError, never broadcast",
        """hazards_call::a_call_is_refused_alike_eager_and_under_jit
        hazards_call::a_single_token_may_have_a_number_as_its_id moe::call_errors""",
    ),
    _row(
        12,
        "float or bool ids: TypeError; every integer type gives the same rows",
        """hazards_call::a_call_is_refused_alike_eager_and_under_jit
        hazards_call::narrow_ids_of_a_large_vocabulary
        hazards_call::wide_ids_are_not_wrapped_into_the_vocabulary
        routers::every_integer_type_of_ids""",
    ),
    _row(
        13,
        "hidden states of another width, of integers or without an axis: an error",
        "hazards_call::a_call_is_refused_alike_eager_and_under_jit moe::call_errors",
    ),
    # Run time.
    _row(
        14,
        "an id outside the table: NaN for its token, no other bit; an error with checks=True",
        """hazards_run_time::ids_outside_the_table_poison_their_tokens_only
        hazards_run_time::checks_raise_for_an_id_outside_the_table
        hazards_run_time::checks_raise_for_a_replayed_index_of_no_expert
        hazards_run_time::checks_change_nothing_else hazards_construction::options_that_are_bools
        hazards_run_time::checks_give_nan_where_equinox_is_told_to
        routers::an_id_outside_the_table_poisons_its_token_only
        moe::replaying_an_index_of_no_expert_poisons_its_token_only""",
    ),
    _row(
        15,
        "no tokens: empty output, zero counts and gradients, finite statistics",
        "hazards_run_time::no_tokens moe::zero_tokens balance::no_tokens",
    ),
    _row(
        16,
        "one expert, all experts, one token, odd sizes, any number of axes",
        """hazards_run_time::any_number_of_axes_and_odd_sizes
        hazards_run_time::as_many_experts_per_token_as_experts_and_one_of_each
        moe::one_expert_and_all_experts""",
    ),
    # Scores.
    _row(
        17,
        "sqrt_softplus and its slope within 2e-7 in float32, 1e-15 in float64",
        """hazards_scores::any_float32_against_mpmath hazards_scores::far_below_is_exactly_zero
        hazards_scores::float64_against_mpmath_and_the_reference_formula
        scoring::float32_value_and_gradient_against_mpmath scoring::limits
        scoring::nan_propagates""",
    ),
    _row(
        18,
        "the same, correctly rounded, for all 65,536 bfloat16 and float16 numbers",
        "scoring::every_narrow_float",
    ),
    _row(
        19,
        "its second derivative is finite and continuous, the function never falls",
        """hazards_scores::derivatives_of_second_order_in_both_modes hazards_scores::never_falls
        scoring::second_derivative""",
    ),
    _row(
        20,
        "extreme logits: finite gradients, exactly 0 for experts not selected",
        """hazards_scores::any_logits_give_finite_weights_and_gradients
        hazards_scores::an_unselected_logit_of_minus_infinity_has_exactly_zero_gradient
        routers::unselected_experts_have_exactly_zero_gradient_at_extreme_logits""",
    ),
    _row(
        21,
        "weights finite, not negative, summing to the scaling factor; 0 if all underflow",
        """hazards_scores::any_logits_give_finite_weights_and_gradients
        hazards_scores::logits_that_all_underflow_give_zero_weights_and_gradients
        scoring::normaliser_gradient scoring::normaliser_of_nothing_is_zero_with_zero_gradient""",
    ),
    _row(
        22,
        "the reference's activation and routers, by formula and by its recorded outputs",
        """hazards_scores::float64_against_mpmath_and_the_reference_formula golden::block
        golden::router_at_a_released_size""",
    ),
    _row(
        23,
        "the vectors on which other libraries differ",
        "hazards_scores::vectors_of_other_libraries routers::adversarial_vectors",
    ),
    # Top-k.
    _row(
        24,
        "ties go to the lower index: eager, jit and vmap",
        """hazards_top_k::ties_go_to_the_lower_index_in_every_mode
        routers::equal_scores_go_to_the_lower_index""",
    ),
    _row(
        25,
        "the selection is distinct, in range, and the best there is",
        "hazards_top_k::the_selection_is_distinct_in_range_and_the_best",
    ),
    _row(
        26,
        "the bias moves the selection only, a common bias nothing; its gradient is 0",
        """hazards_top_k::a_common_bias_changes_nothing
        hazards_top_k::weights_are_of_the_scores_alone routers::no_gradient_reaches_the_bias""",
    ),
    _row(
        27,
        "bias and gate in float32 at the highest precision, bfloat16 parameters or not",
        """hazards_top_k::every_gate_multiplies_in_float32_at_the_highest_precision
        routers::the_bias_keeps_small_steps_in_float32
        routers::bfloat16_parameters_keep_a_float32_gate""",
    ),
    _row(
        28,
        "a NaN score of either sign: NaN for its token, no other row; -inf comes last",
        """hazards_top_k::one_nan_score_of_either_sign_poisons_its_row_only
        hazards_top_k::a_broken_token_changes_no_other_row
        hazards_top_k::minus_infinity_is_never_selected_before_a_finite_logit
        routers::minus_infinity_loses_to_an_underflowed_score""",
    ),
    _row(
        29,
        "groups left out score -inf and not 0",
        """hazards_top_k::groups_with_negative_biased_scores
        routers::masked_groups_are_minus_infinity_not_zero routers::groups_against_the_oracle""",
    ),
    # Experts and dispatch.
    _row(
        30,
        "any assignment equals the loop over tokens: values and all gradients",
        """hazards_experts::any_assignment_against_the_oracle
        moe::values_and_all_gradients_against_the_oracle bfloat16::the_output_is_rounded_once""",
    ),
    _row(
        31,
        "an expert named twice counts with both weights: values and gradients",
        """hazards_experts::an_expert_named_twice_is_the_expert_with_both_weights
        moe::an_expert_named_twice_counts_twice""",
    ),
    _row(
        32,
        "the gradient of an empty expert is exactly 0, for every pattern of empty ones",
        "hazards_experts::every_pattern_of_empty_experts_has_exactly_zero_gradient",
    ),
    _row(
        33,
        "a NaN or infinite token reaches itself and the experts it uses",
        """hazards_experts::a_broken_token_reaches_itself_and_its_experts
        hazards_experts::a_broken_hidden_state_changes_no_other_token_of_the_layer
        hazards_experts::the_dense_backend_isolates_a_broken_token_forward_only
        moe::a_nan_token_reaches_itself_and_its_experts_only""",
        exception="dense, backward",
    ),
    _row(
        34,
        "a NaN in one expert's weights reaches the tokens that use it",
        """hazards_experts::a_broken_expert_reaches_its_tokens_only
        moe::a_nan_in_one_expert_reaches_its_tokens_only""",
        exception="ragged on a CPU; dense, backward",
    ),
    _row(
        35,
        "padding that holds NaN: output 0, every gradient finite, not counted",
        """hazards_experts::padding_that_holds_nan_reaches_no_gradient
        moe::a_masked_token_reaches_nothing moe::a_masked_row_stops_nan_in_both_directions
        routers::masked_tokens_may_hold_anything""",
    ),
    _row(
        36,
        "the order of tokens, the split of a batch, the labels of experts change nothing",
        """hazards_experts::the_order_of_the_tokens_changes_nothing
        hazards_experts::the_split_of_a_batch_changes_nothing
        hazards_experts::the_labels_of_the_experts_change_nothing
        moe::permuting_tokens_and_splitting_batches_changes_nothing""",
    ),
    _row(
        37,
        "the output is linear in the weights; weights of 0 give 0",
        "hazards_experts::the_output_is_linear_in_the_weights",
    ),
    _row(
        38,
        "the clamp at, around and far beyond its limits, shared experts included",
        """hazards_precision::the_clamp_at_every_limit
        hazards_precision::shared_and_routed_experts_are_clamped_alike
        moe::clamped_gate moe::clamped_up""",
    ),
    _row(
        39,
        "float16 products that overflow stay finite; bfloat16 is rounded once",
        """hazards_precision::a_product_beyond_the_largest_float16_is_finite
        bfloat16::the_output_is_rounded_once""",
    ),
    _row(
        40,
        "dtypes: the output as the input, int32 and float32 routing, x64 or not",
        """hazards_precision::no_float64_and_no_int64_leak_with_x64_on
        hazards_precision::float64_tokens_give_float64_with_a_float32_routing
        routers::against_the_oracle""",
    ),
    # State and transformations.
    _row(
        41,
        "the sign of the bias update is that of exact fractions; balance moves nothing",
        """hazards_state::the_sign_is_that_of_exact_fractions
        hazards_state::balanced_counts_move_nothing balance::sign_rule_by_hand
        balance::sign_rule_against_fractions""",
    ),
    _row(
        42,
        "counts are summed before the sign, padding left out, recomputation counted once",
        """hazards_state::shards_are_summed_before_the_sign
        hazards_state::a_skewed_router_is_balanced hazards_state::recomputation_counts_once
        hazards_run_time::no_tokens balance::load_skips_masked_tokens_and_sums_all_axes""",
    ),
    _row(
        43,
        "adamw, lion, adam, momentum and averages: bias and table to the last bit",
        """hazards_state::adam_and_a_moving_average_leave_the_untrained_alone
        filters::ten_steps_leave_bias_and_table_bit_for_bit""",
    ),
    _row(
        44,
        "a cast to bfloat16 keeps the bias float32 and the table int32",
        """hazards_state::a_cast_of_the_trainable_keeps_bias_and_table
        hazards_state::a_cast_of_everything_still_selects_and_updates_in_float32
        state_dict::bfloat16_keeps_the_bias_and_the_table""",
    ),
    _row(
        45,
        "files: the same bits back; another shape, dtype or a missing tensor is an error",
        """transforms::serialisation_is_exact hazards_state::a_file_of_another_layer_is_refused
        state_dict::there_and_back_bit_for_bit state_dict::refused_tensors""",
    ),
    _row(
        46,
        "jit, vmap and grad either way round, scan, checkpoint; no compilation twice",
        """hazards_state::eager_and_jit_route_alike_to_the_last_bit
        hazards_state::second_derivatives_where_they_are_promised
        transforms::vmap_and_grad_either_way_round transforms::scan_over_stacked_layers
        transforms::checkpoint_gives_the_same_gradient transforms::filter_jit_compiles_once""",
        exception="forward mode: dense only",
    ),
    _row(
        47,
        "no weights are baked into a compiled layer; jax.export works with checks off",
        "hazards_state::no_weights_are_baked_into_the_compiled_layer hazards_state::export",
    ),
)


def summary_lines(hazards: Iterable[Hazard], reports: Mapping[str, Iterable]) -> list[str]:
    """A line for each hazard of which tests ran, and one for their number.

    `reports` is pytest's, by outcome. A test counts as failed if its setup or teardown did.
    """
    outcomes: dict[str, list[bool]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in reports.get(outcome, ()):
            name = report.nodeid.partition("[")[0]
            outcomes.setdefault(name, []).append(outcome == "passed")
    lines, held = [], 0
    for hazard in hazards:
        ran = [ok for name in hazard.node_ids() for ok in outcomes.get(name, [])]
        if not ran:
            continue
        held += all(ran)
        verdict = "passed" if all(ran) else "FAILED"
        exception = f" [not: {hazard.exception}]" if hazard.exception else ""
        lines.append(
            f"{hazard.number:2}  {verdict}  {len(ran):3} tests  {hazard.outcome}{exception}"
        )
    return [*lines, f"{held} of {len(lines)} hazards passed"] if lines else []
