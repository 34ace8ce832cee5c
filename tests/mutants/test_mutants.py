"""Edits of the papers' rules and constants, each of which a named test must notice: ``pytest -m slow tests/mutants``.

An edit is made in a copy of the packages; the test then runs against the copy and has to fail. So a test that
would still pass without its feature shows here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = "tests/methods/test_rules.py"
DEFAULTS = "tests/methods/test_paper_defaults.py"
PLAYED = "tests/agents/test_trajectories.py"
SAMPLER = "tests/engine/test_sampler.py"

MUTANTS = [
    # (file, what stands there, what is put in its place, the test that must fail)
    ("methods/agent_baselines.py", "> settings.tau", "< settings.tau", f"{RULES}::test_entropy_aware_opd_doubles_the_weight_of_uncertain_tokens"),
    ("methods/agent_baselines.py", "1 + settings.alpha * uncertain", "settings.alpha * uncertain", f"{RULES}::test_entropy_aware_opd_doubles_the_weight_of_uncertain_tokens"),
    ("config/method_sections.py", "tau: Annotated[Real, Entropy] = 0.8\n    \"\"\"the entropy of the teacher above which it is", "tau: Annotated[Real, Entropy] = 0.5\n    \"\"\"the entropy of the teacher above which it is", f"{RULES}::test_entropy_aware_opd_doubles_the_weight_of_uncertain_tokens"),
    ("methods/policy_gradient.py", "np.abs(own) < self.max_gap", "np.abs(own) < np.inf", f"{RULES}::test_the_mask_of_gaps_looks_at_the_gap_and_not_at_what_is_shifted"),
    ("methods/policy_gradient.py", "np.abs(own) < self.max_gap", "np.abs(own + extra) < self.max_gap", f"{RULES}::test_the_mask_of_gaps_looks_at_the_gap_and_not_at_what_is_shifted"),
    ("loss/importance.py", "weight > 1 + high, weight", "weight > 1e9, weight", f"{RULES}::test_ppo_clips_at_0_8_and_1_28"),
    ("loss/importance.py", "weight < 1 - low)", "weight < 0)", f"{RULES}::test_ppo_clips_at_0_8_and_1_28"),
    ("loss/importance.py", "high: float = 0.28", "high: float = 0.2", f"{RULES}::test_ppo_clips_at_0_8_and_1_28"),
    ("loss/importance.py", "(weight <= high), weight", "(weight <= 99), weight", f"{RULES}::test_the_band_is_half_to_twice"),
    ("methods/uni_opd.py", "sample.reward >= self.settings.correct_from", "sample.reward > 0", f"{RULES}::test_only_whole_rewards_are_correct_rollouts"),
    ("tools/balance.py", "rollouts: int = 8", "rollouts: int = 4", f"{RULES}::test_offline_balancing_asks_each_prompt_eight_times"),
    ("methods/uni_opd.py", "for side in (up, down)]", "for side in (down, up)]", "tests/methods/test_uni_opd.py::test_narrowing_removes_the_rollouts_in_the_way"),
    ("methods/uni_opd.py", "LEAST_KEPT = 0.25", "LEAST_KEPT = 0.5", "tests/methods/test_uni_opd.py::test_narrowing_removes_the_rollouts_in_the_way"),
    ("methods/uni_opd.py", '"spread": (0.5, -0.5)', '"spread": (1.0, -1.0)', "tests/methods/test_uni_opd.py::test_a_shift_makes_the_margin_exactly_delta"),
    ("methods/uni_opd.py", "settings.margin_delta * sides", "0.0 * sides", "tests/methods/test_uni_opd.py::test_masked_tokens_get_no_shift_and_the_fixed_control_ignores_the_margin"),
    ("methods/camopd.py", '"general": (c.score_g, c.rho_g)', '"general": (c.score_g, c.rho_d)', f"{RULES}::test_each_branch_of_camopd_has_its_own_share"),
    ("methods/camopd.py", '{"general": self.settings.r_g', '{"general": self.settings.r_d', "tests/methods/test_camopd.py::test_each_branch_has_its_own_score_share_and_weight"),
    ("methods/camopd.py", "step % (n + 1) < n", "step % (n + 1) <= n", "tests/methods/test_camopd.py::test_alternating_schedule"),
    ("methods/camopd.py", '"pos": np.maximum(gap, 0)', '"pos": np.abs(gap)', "tests/methods/test_camopd.py::test_scores"),
    ("methods/sage_opd.py", "sample.teacher_top1 * mix / mix.sum(axis=1, keepdims=True)", "sample.teacher_top1 / len(mix[0])", f"{RULES}::test_the_confidence_of_a_turn_is_weighted_as_its_teachers_are"),
    ("methods/sage_opd.py", 'every = settings.normalization == "all_tokens"', "every = False", "tests/agents/test_sage.py::test_the_worked_example"),
    ("methods/sage_opd.py", "settings.z_max or np.inf", "np.inf", "tests/agents/test_sage.py::test_z_can_be_bounded"),
    ("methods/sage_opd.py", 'turn.info.get("stop_reason") == "length"', "False", "tests/agents/test_sage.py::test_a_turn_that_is_empty_or_cut_off_is_a_failure_whatever_the_environment_made_of_it"),
    ("methods/sage_judge.py", '"weak": self.config.alpha', '"weak": 1.0', "tests/agents/test_sage.py::test_what_the_judge_says"),
    ("methods/debate/debate.py", "np.array(known) / 100 / tau", "np.array(known) / 100", "tests/engine/test_debate.py::test_weights_are_equation_7"),
    ("methods/debate/debate.py", "len(known) < len(self.teachers)", "not known", "tests/engine/test_debate.py::test_only_the_last_round_counts_and_a_missing_one_makes_all_weights_equal"),
    ("methods/mad_opd.py", '"temperature": (0.7', '"temperature": (1.0', DEFAULTS),
    ("methods/mad_opd.py", '"repetition_penalty": (1.2', '"repetition_penalty": (1.0', DEFAULTS),
    ("methods/mad_opd.py", '"loss_normalization": ("sequence"', '"loss_normalization": ("token"', DEFAULTS),
    ("methods/opad.py", '"divergence": ("jsd"', '"divergence": ("reverse_kl"', DEFAULTS),
    ("methods/uni_opd.py", '"advantage.max_gap": (10.0', '"advantage.max_gap": (20.0', DEFAULTS),
    ("methods/uni_opd.py", '"num_generations": (16', '"num_generations": (8', DEFAULTS),
    ("methods/camopd.py", '"learning_rate": (2e-6', '"learning_rate": (1e-6', DEFAULTS),
    ("methods/sage_opd.py", '"temperature": (0.4', '"temperature": (1.0', DEFAULTS),
    ("methods/opad.py", "-logprob.mean()", "logprob.mean()", "tests/agents/test_opad.py::test_sampled_steps"),
    ("loss/objective.py", "len(lengths) * max(len(sample.target_ids), 1)", "sum(lengths)", "tests/engine/test_step.py::test_token_and_sequence_means_differ_as_their_closed_forms_do"),
    ("methods/sdft.py", ">= skipped", "> skipped", "tests/methods/test_self_distillation.py::test_the_first_tokens_are_left_out_of_the_mean"),
    ("methods/sdpo.py", "itself = other is sample and settings.dont_reprompt_on_self_success", "itself = False", "tests/methods/test_self_distillation.py::test_sdpo_shows_what_succeeded_and_what_was_said"),
    ("methods/sdpo.py", "other.reward < settings.success_reward_threshold", "other.reward <= 0", "tests/methods/test_self_distillation.py::test_sdpo_shows_what_succeeded_and_what_was_said"),
    ("methods/sdpo.py", "self.config.grpo, 1 - weight)", "self.config.grpo, 1.0)", "tests/methods/test_against_trl.py::test_sdpos_loss_is_trls"),
    ("methods/group_relative.py", "LEAST_DEVIATION = 1e-4", "LEAST_DEVIATION = 1e-2", "tests/methods/test_self_distillation.py::test_group_relative_advantages"),
    ("methods/group_relative.py", "values[members].std(ddof=1)", "values[members].std()", "tests/methods/test_self_distillation.py::test_group_relative_advantages"),
    ("methods/group_relative.py", "settings.epsilon if settings.epsilon_high is None", "1.0 if settings.epsilon_high is None", "tests/methods/test_self_distillation.py::test_rewards_are_clipped_as_in_ppo"),
    ("methods/group_relative.py", "return sample.trajectory or sample.id", "return sample.id", "tests/methods/test_rewards.py::test_states_of_one_episode_count_once"),
    ("methods/g_opd.py", "(1 - scale) * is_reference", "(scale - 1) * is_reference", "tests/methods/test_rewards.py::test_the_advantage_gives_the_gradient_of_a_scaled_reward"),
    ("methods/token_selection.py", "math.log(share / (1 - share))", "math.log(share)", "tests/methods/test_rewards.py::test_rewards_are_bounded_from_below_on_uncertain_tokens"),
    ("methods/token_selection.py", "np.sort(entropy)[::-1]", "np.sort(entropy)", "tests/methods/test_rewards.py::test_rewards_are_bounded_from_below_on_uncertain_tokens"),
    ("methods/token_selection.py", "np.log(draws) < teacher", "np.log(draws) > teacher", "tests/methods/test_rewards.py::test_tokens_are_verified_as_in_speculative_decoding"),
    ("teachers/own.py", "self.steps % self.every == 0", "self.steps % self.every == 1", "tests/teachers/test_own.py::test_averages_are_those_of_the_closed_form"),
    ("teachers/own.py", "p.dtype.itemsize < 4", "p.dtype.itemsize < 1", "tests/teachers/test_own.py::test_averages_of_half_precision_are_not_lost"),
    ("methods/stale.py", "truncated(sample.policy_logratio, clip)", "truncated(sample.policy_logratio, 99.0)", "tests/methods/test_against_trl.py::test_the_divergence_of_older_rollouts_is_weighed_as_in_trl"),
    ("methods/gkd.py", "/ 2**64 >= self.settings.lmbda", "/ 2**64 < self.settings.lmbda", "tests/methods/test_gkd.py::test_a_draw_is_that_of_seed_step_and_prompt"),
    ("methods/gkd.py", "{self.config.seed}:{number}:", "{self.config.seed}:", "tests/methods/test_gkd.py::test_a_draw_is_that_of_seed_step_and_prompt"),
    ("methods/eopd.py", "[:, 0] > self", "[:, 0] < self", "tests/methods/test_eopd.py::test_uncertain_tokens_have_the_forward_kl"),
    ("methods/gkd.py", '"gkd.lmbda": (0.5,', '"gkd.lmbda": (0.6,', DEFAULTS),
    ("methods/gkd.py", "alpha * sample.target_turn_weight", "sample.target_turn_weight", "tests/methods/test_gkd.py::test_given_answers_have_a_supervised_term"),
    ("methods/gold.py", "share=0.2", "share=0.15", "tests/methods/test_gold.py::test_text_that_is_not_kept_is_not_judged"),
    ("loss/gold.py", "(share if one is None else one)", "(1.0 if one is None else one)", "tests/methods/test_gold.py::test_loss_and_gradient_are_trls"),
    ("loss/gold.py", "(1 - share if other is None else other)", "(1 - share)", "tests/methods/test_gold.py::test_loss_and_gradient_are_trls"),
    ("methods/policy_gradient.py", '"truncated": ("advantage.low",)', '"truncated": ()', "tests/methods/test_advantage.py::test_impossible_settings_are_refused"),
    ("loss/objective.py", "np.where(own == kind, sample.kl_weight, 0)", "sample.kl_weight", "tests/methods/test_eopd.py::test_every_token_has_the_gradient_of_its_own_divergence"),
    ("loss/objective.py", "[sign * kl_weight(sample)", "[kl_weight(sample)", "tests/methods/test_rewards.py::test_the_exact_form_has_the_gradient_of_a_scaled_reward"),
    ("methods/trajectories.py", 'not sample.info["success"]', "False", f"{PLAYED}::test_failures_are_left_out_where_that_is_asked_for"),
    ("methods/trajectories.py", "ended=ended", "ended=True", f"{PLAYED}::test_a_turn_that_has_no_end_is_given_none"),
    ("methods/trajectories.py", "theirs if same else None", "theirs", f"{PLAYED}::test_a_teacher_with_other_tokens_reads_its_own_chat_and_is_kept_in_the_students"),
    ("methods/trajectories.py", "self.view(episode.prompt)", "episode.prompt", f"{PLAYED}::test_a_teacher_may_be_shown_more_than_the_student"),
    ("models/reply.py", "or ids[-1] in ends", "or True", f"{PLAYED}::test_an_end_that_the_student_does_not_know_becomes_its_own"),
    ("rollout/chats.py", "0, width - part.shape[2], 0", "0, 0, width - part.shape[2]", f"{SAMPLER}::test_the_turns_of_a_chat_are_sampled_from_the_model_itself"),
    ("rollout/chats.py", "+ length <= self.budget", "<= self.budget", f"{SAMPLER}::test_what_was_read_is_of_the_same_tokens_and_within_the_budget"),
    ("rollout/transformers.py", "() if request.images else request.token_ids", "request.token_ids", "tests/vision/test_vision_step.py::test_a_chat_that_comes_to_a_picture_is_read_whole"),
    ("rollout/transformers.py", "and not requests[0].images and isinstance", "and isinstance", "tests/vision/test_vision_step.py::test_what_was_read_of_one_picture_is_not_taken_for_another"),
    ("teachers/own.py", "            left_out.discard(name)\n", "            left_out.clear()\n", "tests/teachers/test_own.py::test_an_average_that_would_not_follow_is_refused"),
    ("teachers/store.py", "or _digest(content) != place.digest", "or False", "tests/teachers/test_stored.py::test_damage_is_said_and_asked_anew"),
    ("teachers/store.py", 'digest.decode("latin-1") != _digest(body)', "False", "tests/teachers/test_stored.py::test_damaged_lines_of_an_index_are_not_used"),
    ("teachers/store.py", "(context.token_ids, context.target_positions)", "(context.token_ids,)", "tests/teachers/test_stored.py::test_keys_are_of_all_that_a_teacher_reads"),
    ("teachers/store.py", "self.size + sum(map(len, parts))", "sum(map(len, parts))", "tests/teachers/test_stored.py::test_a_folder_has_a_limit"),
    ("teachers/stored.py", '"dtype": dtype, "dtype of', '"dtype of', "tests/teachers/test_stored.py::test_another_teacher_does_not_meet_what_this_one_said"),
    ("teachers/stored.py", "{**found, **files,", "{**found,", "tests/teachers/test_stored.py::test_another_adapter_is_another_teacher"),
    ("teachers/stored.py", "Hidden(t.states.to(dtype))", "t", "tests/teachers/test_stored.py::test_bfloat16_rounds_states_once"),
    ("teachers/stored.py", "None if context.sampled else", "", "tests/teachers/test_stored.py::test_what_the_student_samples_is_not_kept"),
    ("teachers/stored.py", "not apart <= MOST_APART", "False", "tests/teachers/test_stored.py::test_log_probs_of_an_endpoint"),
]  # fmt: skip


def test_every_edit_is_of_what_stands_there() -> None:
    """So that the list is brought up to date with the code, and not at the next long run."""
    texts = {file: (ROOT / "opdengine" / file).read_text() for file, *_ in MUTANTS}
    assert [(file, old) for file, old, *_ in MUTANTS if texts[file].count(old) != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "test"), MUTANTS)
def test_the_named_test_notices_the_edit(tmp_path: Path, file: str, old: str, new: str, test: str) -> None:
    for package in ("opdengine", "kernels/opd_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    place = tmp_path / "opdengine" / file
    place.write_text(place.read_text().replace(old, new))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'kernels'}"}
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 1, f"{test} passes although {file} says {new!r}:\n{run.stdout[-2000:]}"
