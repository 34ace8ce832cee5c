"""The loss of TRL's ``SDFTTrainer`` and ``SDPOTrainer`` from hidden states and heads:

    class FusedSDFTTrainer(SDFTTrainer):
        compute_loss = opd_kernels.trainers.trl_self_distillation_compute_loss

The teacher is the student under a longer prompt (its base, a copy, or itself), and judges the same completion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .causal_lm import in_place_of_head, teacher_head
from .divergence import from_trl_beta, linear_divergence
from .logprob import linear_logprob
from .types import LMHead, LogprobOutput, TeacherHead

ROWS = 256
"""Hidden states whose logits are made at a time, where the student's likeliest tokens are looked up."""


def trl_self_distillation_compute_loss(
    trainer: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
) -> Tensor:
    """``compute_loss`` of TRL's ``SDFTTrainer`` and ``SDPOTrainer`` (``distillation_weight=1``), without logits.

    Args:
        trainer: whose settings, teacher and metrics are used.
        model: the student as the trainer wraps it.
        inputs: the batch that the trainer prepared.
        return_outputs, num_items_in_batch: as the trainers have them: the first is refused, the second is not read.

    Raises:
        ValueError: a setting needs logits, or as :func:`opd_kernels.causal_lm.in_place_of_head`.
    """
    args, skipped = trainer.args, getattr(trainer, "num_loss_tokens_to_skip", 0)
    _require_possible(trainer, return_outputs)
    mask = inputs["completion_mask"].bool()
    mask = mask & (torch.arange(mask.shape[1], device=mask.device) >= skipped)
    if (chosen := inputs.get("self_distillation_mask")) is not None:
        mask = mask & chosen.bool()[:, None]
    weight = (mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask))[mask]
    labels, old = inputs["completion_ids"][mask], inputs.get("old_per_token_logps")
    with trainer._get_teacher_context_for_self_distillation():
        read = {"input_ids": inputs["teacher_input_ids"], "attention_mask": inputs["teacher_attention_mask"]}
        judge = teacher_head(trainer.teacher_model, rows=_predicting(mask, read), use_cache=False, **read)
    given: dict[str, Any] = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }
    rows = _predicting(mask, given)

    def loss(states: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        states = states[rows]
        ratio = torch.ones_like(weight)
        if args.distillation_is_clip is not None and old is not None:
            with torch.no_grad():
                now = linear_logprob(states, head, labels, temperature=trainer.temperature).logprob
            ratio = (now - old[mask]).clamp(-20.0, 20.0).exp().clamp(max=args.distillation_is_clip)
        total, each = _divergence(args, states, head, judge, labels, weight * ratio, trainer.temperature)
        return total, each * ratio

    total, each = in_place_of_head(model, loss, use_cache=False, **given)
    mean = trainer.accelerator.gather(each.sum() / max(len(each), 1)).mean().item()
    trainer._log_self_distillation_metric("train" if model.training else "eval", mean)
    scale: float = trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0
    return total / scale


def _require_possible(trainer: Any, return_outputs: bool) -> None:
    if return_outputs:
        raise ValueError("the fused loss has no outputs to return; leave compute_metrics out")
    if trainer.use_teacher_server:
        raise ValueError("use_teacher_server=True brings the teacher's log-probs; use the trainer's own loss")
    if (weight := getattr(trainer.args, "distillation_weight", 1.0)) != 1.0:
        raise ValueError(
            f"distillation_weight={weight} adds a policy loss, which the trainer takes from logits; set it to 1, or "
            "use the trainer's own loss"
        )


def _predicting(mask: Tensor, read: dict[str, Tensor]) -> Tensor:
    """bool [B, L]: the positions that predict the tokens of a completion [B, C], which stands at the end."""
    return nn.functional.pad(mask, (read["input_ids"].shape[1] - mask.shape[1] - 1, 1))


def _divergence(
    args: Any, states: Tensor, head: LMHead, judge: TeacherHead, labels: Tensor, weight: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The weighted sum, and the detached divergence of every token [N]."""
    alpha = args.distillation_alpha
    if args.distillation_mode == "full_logits":
        options = {**from_trl_beta(alpha), "temperature": temperature}
        found = linear_divergence(states, head, [judge], token_weight=weight, **options)
        return found.loss, found.token_loss
    many = args.distillation_mode == "topk_logits"
    ids = _likeliest(states, head, args.distillation_topk) if many else labels
    tail = many and args.distillation_add_tail
    own = linear_logprob(states, head, ids, temperature=temperature, tail=tail)
    theirs_head = LMHead(judge.weight, judge.bias, judge.logit_scale, judge.softcap)
    with torch.no_grad():
        theirs = linear_logprob(judge.hidden, theirs_head, ids, temperature=temperature, tail=tail)
    p, q = own.logprob, theirs.logprob
    if not many:
        each = (p - q).detach() * p
    elif tail:
        each = _listed(_with_tail(own), _with_tail(theirs), alpha)
    else:
        each = _listed(p.log_softmax(-1), q.log_softmax(-1), alpha)
    return (weight * each).sum(), each.detach()


@torch.no_grad()
def _likeliest(states: Tensor, head: LMHead, count: int) -> Tensor:
    """int64 [N, count]: the student's likeliest tokens, from a few rows of logits at a time."""
    head = head.to(states.dtype)
    return torch.cat([head.logits(some).topk(count).indices for some in states.split(ROWS)])


def _with_tail(found: LogprobOutput) -> Tensor:
    """[N, k + 1]: log-probs of a list and of all other tokens together."""
    assert found.tail is not None
    return torch.cat([found.logprob, found.tail.clamp(min=-100.0)[:, None]], dim=1)


def _listed(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """[N]: TRL's divergence of a student p and a teacher q over a list of tokens [N, k], both log-probs."""
    if alpha in (0.0, 1.0):
        return (q.exp() * (q - p)).sum(-1) if alpha == 0.0 else (p.exp() * (p - q)).sum(-1)
    mixed = torch.logaddexp(p + math.log1p(-alpha), q + math.log(alpha))
    return (alpha * q.exp() * (q - mixed) + (1 - alpha) * p.exp() * (p - mixed)).sum(-1)
