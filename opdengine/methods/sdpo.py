"""SDPO: self-distillation policy optimisation (Hübotter et al., arXiv 2601.20802).

The student's rollouts are graded. Each is then judged by the same model (``teachers: [{model: self, weights: ema}]``)
that has been shown a successful rollout of the same prompt, and what was said of this one; where there is neither, a
rollout teaches nothing. Tokens have the gap of the two as their advantage, or the divergence over the whole vocabulary
(``advantage.kl_mode``). With ``sdpo.distillation_weight`` w below 1, 1 - w of a group-relative policy gradient is
added.
"""

from __future__ import annotations

from collections.abc import Sequence

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods import group_relative
from opdengine.methods.checks import SAMPLED, Check
from opdengine.methods.method import judged_by, route
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import CHECKS, check_ratio, gap_of, policy_gradient, warn_of_sampling
from opdengine.methods.privileged import column, lack_of_user, privileged_text, told
from opdengine.methods.sdft import SelfTaught
from opdengine.models.chat import written
from opdengine.models.thoughts import without_thoughts
from opdengine.types import Batch, Prompt, Sample

PAPER = Paper(
    arxiv="2601.20802",
    defaults={
        "divergence": ("reverse_kl", "as in TRL; the released code has jsd with advantage.kl_mode full_vocab"),
        "advantage.importance": ("truncated", "released code"),
        "advantage.high": (2.0, "released code"),
        "advantage.max_gap": (float("inf"), "released code: no bound"),
        "loss_normalization": ("sequence", "as in TRL"),
        "num_generations": (8, "as in TRL"),
        "temperature": (1.0, "as in TRL"),
        "learning_rate": (1e-6, "released code"),
    },
    choices={
        "teachers.weights": "ema",
        "teachers.teacher_update_rate": "0.05, released code",
        "sdpo.include_environment_feedback": "true, released code",
        "sdpo.environment_feedback_only_without_solution": "true, released code",
        "sdpo.remove_thinking_from_demonstration": "true, released code",
    },
)


class SDPO(SelfTaught):
    """What succeeded, and what was said, in the teacher's prompt."""

    paper = PAPER

    needs_reward = True

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.settings = config.sdpo
        self.gradient = policy_gradient(config, PAPER)
        self.needs = self.gradient.needs | group_relative.NEEDS
        if config.teacher_prompt_template is not None:
            raise ConfigError(
                "teacher_prompt_template is not possible with method 'sdpo', whose teacher reads "
                "sdpo.reprompt_template; leave it out, and name the column of feedback privileged_context"
            )
        if config.grpo.weight:
            raise ConfigError(
                f"grpo.weight={config.grpo.weight} is not possible with method 'sdpo', whose rewards have the weight "
                "1 - sdpo.distillation_weight; set that"
            )
        group_relative.need_rollouts(config, "method 'sdpo'")
        weight = self.settings.distillation_weight
        self.diverges = self.gradient.exact and weight > 0
        if weight < 1:
            check_ratio(config, f"sdpo.distillation_weight={weight}", "sdpo.distillation_weight to 1")
            if self.gradient.exact:  # else the gap has said so
                warn_of_sampling(config, f"sdpo.distillation_weight={weight}")
        else:
            group_relative.refuse_unweighed(config, "sdpo.distillation_weight=1.0", "set that below 1")

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where no rollout is told anything: nothing is distilled then."""
        silent = Check(
            "sdpo/unshown", SAMPLED, "rollouts have neither a successful one of the same prompt nor feedback, and are "
            "not judged", "raise num_generations, lower sdpo.success_reward_threshold, or set "
            "sdpo.include_environment_feedback", share=1.0,
        )  # fmt: skip
        return (*super().checks, *CHECKS, *group_relative.CHECKS, silent)

    def lack(self, prompt: Prompt) -> str:
        """Its chat has a message of the user, which the teacher's takes the place of."""
        return super().lack(prompt) or lack_of_user(prompt, "sdpo.reprompt_template")

    async def annotate(self, batch: Batch) -> None:
        """Put what succeeded and what was said into the teachers' prompts."""
        groups: dict[str, list[Sample]] = {}
        for sample in batch:
            groups.setdefault(sample.group, []).append(sample)
        shown = {"sdpo/with_solution": 0, "sdpo/with_feedback": 0, "sdpo/unshown": 0}
        for sample in batch:
            solution, feedback = self._solution(sample, groups[sample.group]), self._feedback(sample)
            if solution and self.settings.environment_feedback_only_without_solution:
                feedback = ""
            shown["sdpo/with_solution"] += bool(solution)
            shown["sdpo/with_feedback"] += bool(feedback)
            shown["sdpo/unshown"] += not solution and not feedback
            if solution or feedback:
                columns = {"solution": solution, "feedback": feedback}
                messages = told(sample.prompt.messages, self.settings.reprompt_template, columns)
                judged_by(sample, route(self.teachers, sample.prompt.key), messages)
        batch.metrics |= {name: float(count) for name, count in shown.items()}

    def weigh(self, batch: Batch) -> None:
        """``w`` times the distillation and ``1 - w`` times the rewards' advantage."""
        samples, weight = list(batch), self.settings.distillation_weight
        scale = [weight if sample.teacher_targets else 0.0 for sample in samples]
        self.gradient.weigh(batch, self.ranks, [gap_of(sample) for sample in samples], scale)
        if weight < 1:
            group_relative.add_advantages(batch, self.ranks, self.config.grpo, 1 - weight)

    def _solution(self, sample: Sample, group: Sequence[Sample]) -> str:
        """The first successful rollout of the prompt that shows anything, in its frame; "" where there is none."""
        settings = self.settings
        if not settings.use_successful_as_teacher:
            return ""
        for other in group:
            itself = other is sample and settings.dont_reprompt_on_self_success
            if itself or other.reward is None or other.reward < settings.success_reward_threshold:
                continue
            if text := demonstration(other, settings.remove_thinking_from_demonstration):
                return settings.solution_template.format(successful_previous_attempt=text)
        return ""

    def _feedback(self, sample: Sample) -> str:
        """What was said of the rollout, in its frame; "" where nothing was."""
        if not self.settings.include_environment_feedback:
            return ""
        said = privileged_text(column(sample.prompt, "privileged_context"))
        failed = sample.reward is not None and sample.reward < self.settings.success_reward_threshold
        said = said or (str(sample.info.get("feedback", "")) if failed else "")
        return self.settings.feedback_template.format(feedback_raw=said) if said.strip() else ""


def demonstration(rollout: Sample, only_answers: bool) -> str:
    """What the student wrote in a rollout, turn by turn; "" where there is nothing to show.

    Args:
        rollout: of one turn, or an episode.
        only_answers: leave out thoughts, and turns of which the thoughts have no end.
    """
    said = [written(m) for turn in rollout.turns for m in turn.messages if m["role"] == "assistant"] or [rollout.text]
    if only_answers:
        said = [(without_thoughts(text) or "").strip() for text in said]
    text = "\n".join(part for part in said if part)
    return text if text.strip() else ""
