"""The fused loss in other trainers, on the models as they wrap them.

TRL's ``GKDTrainer`` and ``GOLDTrainer`` (one tokenizer):

    class FusedGKDTrainer(GKDTrainer):
        compute_loss = opd_kernels.trainers.trl_gkd_compute_loss

``transformers.Trainer``:

    distil = TrainerLoss(model, [teacher], divergence="jsd")
    Trainer(model=model, data_collator=distil.collator(collator), compute_loss_func=distil, ...)

verl's top-k distillation: ``verl_forward_kl_topk``. TRL's ``DistillationTrainer`` and ms-swift take a function or a
class of :mod:`opd_kernels.adapters`.

Losses are those of the trainers, with float32 logits under autocast, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .adapters import refuse_one_seed
from .causal_lm import Replaced, in_place_of_head, teacher_head, unwrapped
from .divergence import from_trl_beta, linear_divergence
from .logprob import linear_logprob
from .trl_self_distillation import trl_self_distillation_compute_loss as trl_self_distillation_compute_loss
from .types import LMHead

IGNORED = -100
"""Label of the tokens that do not count."""


def trl_gkd_compute_loss(
    trainer: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """``compute_loss`` of TRL's ``GKDTrainer``, without logits.

    Args:
        trainer: of which ``teacher_model`` and ``beta`` are read.
        model: the student as the trainer wraps it.
        inputs: ``input_ids``, ``attention_mask`` and ``labels`` [B, L].
        return_outputs: also return an output, which is empty.
        num_items_in_batch: denominator of the loss; None: the tokens that count, at least 1.

    Raises:
        ValueError: ``compute_metrics`` needs logits, or as :func:`opd_kernels.causal_lm.in_place_of_head`.
    """
    return _trl_loss(trainer, model, inputs, return_outputs, num_items_in_batch, temperature=1.0)


def trl_gold_compute_loss(
    trainer: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    """``compute_loss`` of TRL's ``GOLDTrainer`` for a teacher with the student's tokenizer, without logits.

    Arguments are those of :func:`trl_gkd_compute_loss`; the trainer's ``temperature`` divides both models' logits.

    Raises:
        ValueError: ``use_uld_loss`` or images are asked for; and as there.
    """
    if trainer.use_uld_loss and trainer.teacher_tokenizer is not None:
        raise ValueError("use_uld_loss=True compares two tokenizers, which needs logits; use GOLDTrainer as it is")
    if extra := sorted(trainer._get_model_forward_kwargs(inputs)):
        raise ValueError(f"the batch has {extra}; the fused loss is for text: use GOLDTrainer as it is")
    return _trl_loss(trainer, model, inputs, return_outputs, num_items_in_batch, temperature=trainer.temperature)


def _trl_loss(trainer: Any, model: nn.Module, inputs: Any, return_outputs: bool, items: Any, temperature: float) -> Any:
    if return_outputs and (trainer.compute_metrics or trainer.preprocess_logits_for_metrics):
        raise ValueError("compute_metrics needs logits, which a fused loss does not make; leave it out")
    rows = predicting(inputs["labels"])
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    judge = teacher_head(trainer.teacher_model.eval(), rows=rows, **given)
    options = {**from_trl_beta(trainer.beta), "temperature": temperature}
    total = in_place_of_head(model, lambda states, head: _divergence(states[rows], head, [judge], options), **given)
    loss = total / denominator(rows, items)
    return (loss, {}) if return_outputs else loss


def _divergence(states: Tensor, head: LMHead, judges: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    return linear_divergence(states, head, judges, **options).loss


def predicting(labels: Tensor) -> Tensor:
    """bool [B, L]: the positions whose hidden states predict a token that counts, from labels [B, L]."""
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))


def denominator(rows: Tensor, items: Tensor | int | None) -> Tensor | int:
    """What a sum over tokens is divided by: the number of items that the trainer counted, or the tokens that count;
    1 for none, where the sum is 0, too."""
    items = rows.sum() if items is None else items.to(rows.device) if isinstance(items, Tensor) else items
    return items + (items == 0)


class TrainerLoss:
    """``compute_loss_func`` of ``transformers.Trainer``: the divergence to teachers that read the same tokens.

    The student is hooked: a batch of :meth:`collator` gives it no logits but the loss; ``generate`` and every other
    call are as before. Evaluation without ``compute_metrics`` gives the loss, too.

    Args:
        model: the student, before the trainer wraps it; with an adapter or without.
        teachers: models with the student's tokenizer, on its device; they are put into evaluation mode.
        options: keyword arguments of ``linear_divergence`` that are not per token, such as ``divergence``,
            ``temperature``, ``mix`` or ``vocab_size``.

    Raises:
        ValueError: an option is per token or ``vocab_sample``, whose seed differs in every call.
    """

    KEY = "fused_labels"
    """The input that asks for the loss."""

    def __init__(self, model: nn.Module, teachers: Sequence[nn.Module], **options: Any) -> None:
        if wrong := sorted(set(options) & {"token_weight", "labels", "logprob_weight", "reduction", "stats"}):
            raise ValueError(f"{wrong} cannot be set here: the loss is a mean over the tokens that count")
        refuse_one_seed(options)
        self.teachers = [teacher.eval() for teacher in teachers]
        self.options = options
        self.rows: Tensor | None = None
        self._replaced: Replaced | None = None
        core = unwrapped(model)
        core.register_forward_pre_hook(self._before, with_kwargs=True)
        core.register_forward_hook(self._after, always_call=True)

    def collator(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The trainer's data collator, with what the student needs for the loss in every batch.

        Args:
            collate: makes batches with ``labels`` [B, L], not shifted, -100 where a token does not count.
        """

        def collated(examples: Any) -> Any:
            batch = collate(examples)
            return {**batch, self.KEY: batch["labels"]}

        return collated

    def __call__(self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Any = None) -> Tensor:
        """The loss of the student's output."""
        if self.rows is None or not isinstance(outputs, dict) or set(outputs) != {"loss"}:
            raise ValueError(
                "the student's output holds no fused loss; give the trainer data_collator=loss.collator(...)"
            )
        rows, self.rows = self.rows, None
        total: Tensor = outputs["loss"]
        return total / denominator(rows, num_items_in_batch)

    def _before(self, core: nn.Module, args: Any, inputs: dict[str, Any]) -> Any:
        labels = inputs.get(self.KEY)
        if labels is None:
            return None
        self.rows = rows = predicting(labels)
        inputs = {k: v for k, v in inputs.items() if k not in (self.KEY, "num_items_in_batch")} | {"use_cache": False}
        judges = [teacher_head(teacher, rows=rows, **inputs) for teacher in self.teachers]

        def loss(states: Tensor, head: LMHead) -> dict[str, Tensor]:
            return {"loss": _divergence(states[rows], head, judges, self.options)}

        self._replaced = Replaced(core, loss)
        self._replaced.__enter__()
        return args, inputs

    def _after(self, core: nn.Module, args: Any, output: Any) -> None:
        if self._replaced is not None:
            replaced, self._replaced = self._replaced, None
            replaced.__exit__(None if output is not None else RuntimeError)  # of a pass that failed there is no output


def verl_forward_kl_topk(
    student_hidden: Tensor,
    head: LMHead,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    *,
    temperature: float = 1.0,
    log_prob_min_clamp: float | None = None,
) -> dict[str, Tensor]:
    """verl's ``compute_forward_kl_topk`` from hidden states: for ``fused_linear_aux`` of a model's output.

    Args:
        student_hidden: [1, T, d], of packed sequences.
        head: of the student.
        teacher_topk_log_probs: [1, T, k], or nested [B, jagged, k].
        teacher_topk_ids: int64 of the same shape.
        temperature: divides the student's logits.
        log_prob_min_clamp: lower bound of both models' log-probs in the divergence.

    Returns:
        ``distillation_losses``, ``student_mass`` and ``teacher_mass``, each [1, T]; the first two are differentiable.
        The overlap of the likeliest tokens, a diagnostic of verl, needs the student's logits and is left out.
    """
    logprobs, ids = (t.values()[None] if t.is_nested else t for t in (teacher_topk_log_probs, teacher_topk_ids))
    if ids.shape[:2] != student_hidden.shape[:2] or ids.shape != logprobs.shape:
        raise ValueError(
            f"hidden states {list(student_hidden.shape)} and the teacher's tokens {list(ids.shape)} and log-probs "
            f"{list(logprobs.shape)} are not of the same tokens"
        )
    found = linear_logprob(student_hidden.flatten(0, 1), head, ids.flatten(0, 1), temperature=temperature).logprob
    student, teacher = found.view(ids.shape), logprobs.to(found.dtype)
    masses = student.exp().sum(-1), teacher.exp().sum(-1)
    if log_prob_min_clamp is not None:
        student, teacher = student.clamp_min(log_prob_min_clamp), teacher.clamp_min(log_prob_min_clamp)
    losses = (teacher.exp() * (teacher - student)).sum(-1)
    return {"distillation_losses": losses, "student_mass": masses[0], "teacher_mass": masses[1]}
