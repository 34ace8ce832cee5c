"""The fused divergence behind the call signatures of other libraries, so that adopting it is one line.

In code written for Liger (ms-swift among others):

    from opd_kernels.adapters import LigerFusedLinearJSDLoss   # was: from liger_kernel.chunked_loss import ...
    from opd_kernels.adapters import LigerFusedLinearJSD       # was: from liger_kernel.transformers import ...

In TRL's ``DistillationTrainer``:

    trl.trainer.distillation_trainer._chunked_divergence_loss = opd_kernels.adapters.trl_chunked_divergence_loss

Trainers whose loss starts at logits (TRL's ``GKDTrainer``, ``transformers.Trainer``) are served by
:mod:`opd_kernels.trainers`.

In one's own module: ``LinearDivergence(divergence="jsd", temperature=2.0)``.

Definitions that agree, checked against trl 1.16 and liger-kernel 0.8.5 by the tests: ``beta`` 0 is the
forward KL(teacher || student), 1 the reverse KL, between them beta KL(teacher || m) + (1 - beta)
KL(student || m) with m = beta teacher + (1 - beta) student; the temperature divides both models'
logits and the loss is not multiplied by its square; the denominator of a mean is the number of tokens
that are not ignored, at least 1.

Where they do not agree:

- Vocabularies of different widths. Liger appends zero logits to a narrower student, which gives the
  padding ids probability mass and a gradient; with a wider student it fails. Here a difference is an
  error until ``vocab_size`` says how many columns are real.
- Rounding. Liger's chunked loss and TRL's GKD form the logits in the dtype of the inputs; here they
  are float32, as in TRL's chunked divergence on a GPU.
- Ignored rows and -inf. Liger and TRL's GKD compute ignored rows and mask them after, so that NaN
  or inf there reaches a gradient; here such rows are not computed. A bias of -inf gives NaN in peers and switches the
  column off here.
- Liger's ``compiled``, ``chunk_size`` and ``accum_dtype`` change speed and rounding only. They are
  accepted and have no effect: chunks follow from ``workspace_bytes``, sums are float32.
- Liger's soft and hard parts (``return_soft_hard_loss``) receive no gradient of their own there; here
  they are detached.
- TRL's ``reduction="mean"`` averages over vocabulary entries as well, which is not a KL divergence;
  its ``"batchmean"`` without labels divides by the number of sequences. Here "mean" is always over
  tokens.
- TRL's ``_add_tail_bucket`` computes the student's tail as 1 - sum p and clamps it at 1e-7;
  ``topk_divergence`` sums the tail's own columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .divergence import from_trl_beta, linear_divergence
from .logprob import linear_logprob
from .types import DivergenceOutput, TeacherHead


def refuse_one_seed(options: Mapping[str, Any]) -> None:
    """Raise ValueError where columns would be sampled with the same seed in every call: the noise would not average
    out."""
    if wrong := sorted({"vocab_sample", "sample_seed"} & set(options)):
        raise ValueError(f"{wrong} cannot be set here: each call needs a seed of its own; call linear_divergence")


class LinearDivergence(nn.Module):
    """``linear_divergence`` as a module without parameters.

    Args:
        divergence: as in ``linear_divergence``.
        reduction: "mean" over the tokens that count (the default of a loss module), "sum" or "none".
        ignore_index: label whose rows do not count.
        options: any other keyword argument of ``linear_divergence`` that is not per token:
            ``jsd_beta``, ``skew_alpha``, ``teacher_reduction``, ``temperature``, ``stats``, ``impl``,
            ``workspace_bytes``, ``vocab_size``, ``student_logit_scale``, ``student_softcap``,
            ``group``; not ``vocab_sample``, whose seed differs in every call.

    Raises:
        ValueError: ``vocab_sample`` is among the options.
    """

    def __init__(
        self, divergence: str = "reverse_kl", *, reduction: str = "mean", ignore_index: int = -100, **options: Any
    ) -> None:
        super().__init__()
        refuse_one_seed(options)
        self.options: dict[str, Any] = {"divergence": divergence, "reduction": reduction, **options}
        self.ignore_index = ignore_index

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teachers: Sequence[TeacherHead],
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        mix: Tensor | Sequence[float] | None = None,
        student_bias: Tensor | None = None,
    ) -> DivergenceOutput:
        """The divergence of hidden states with any leading axes.

        Args:
            student_hidden: [..., d_s], already aligned with the predicted tokens: nothing is shifted.
            student_weight: [V, d_s].
            teachers: heads whose hidden states are [..., d_k] with the same leading axes.
            labels: [...] int64; rows with ``ignore_index`` get weight 0.
            token_weight: [...] weight of each row; default 1.
            mix: [K] or [..., K].
            student_bias: [V] or None.

        Returns:
            ``DivergenceOutput``; per-token tensors are flat, [N], except that a loss of
            ``reduction="none"`` has the leading axes of ``student_hidden``.

        Raises:
            ValueError: as ``linear_divergence``.
        """
        leading = student_hidden.shape[:-1]
        weight = None if token_weight is None else token_weight.flatten()
        if labels is not None:
            labels = labels.flatten()
            counted = labels != self.ignore_index
            weight = counted.float() if weight is None else torch.where(counted, weight, 0.0)
        if isinstance(mix, Tensor) and mix.dim() > 2:
            mix = mix.flatten(0, -2)
        output = linear_divergence(
            flat(student_hidden),
            student_weight,
            [replace(teacher, hidden=flat(teacher.hidden)) for teacher in teachers],
            labels=labels,
            token_weight=weight,
            mix=mix,
            student_bias=student_bias,
            **self.options,
        )
        if self.options["reduction"] != "none":
            return output
        return replace(output, loss=output.loss.view(leading))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LigerFusedLinearJSDLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`` on this package's op; see the module
    docstring for what differs.

    Args:
        weight_hard_loss: factor of the cross-entropy on ``true_labels`` at temperature 1, a second
            pass over the student; 0 leaves it out.
        weight_soft_loss: factor of the divergence.
        beta: 0 forward KL, 1 reverse KL, between them the teacher's share of the JSD's mixture.
        ignore_index: label of the tokens that do not count.
        temperature: divides both models' logits.
        compiled, chunk_size: accepted, without effect.
        return_soft_hard_loss: return (loss, soft, hard), the parts detached.
        vocab_size: number of valid leading columns; needed when the heads differ in width.
        workspace_bytes, impl: as in ``linear_divergence``.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        vocab_size: int | None = None,
        workspace_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.return_soft_hard_loss = return_soft_hard_loss
        self.common: dict[str, Any] = {"vocab_size": vocab_size, "workspace_bytes": workspace_bytes, "impl": impl}
        options = {**from_trl_beta(beta), "temperature": temperature, **self.common}
        self.soft = LinearDivergence(ignore_index=ignore_index, **options)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, a scalar.

        Args:
            student_input: [N, d_s].
            student_weight: [V, d_s].
            teacher_input: [N, d_t].
            teacher_weight: [V, d_t].
            true_labels: [N] int64, ``ignore_index`` where a token does not count.
            student_bias: [V] or None.
            teacher_bias: [V] or None.

        Raises:
            ValueError: as ``linear_divergence`` and ``linear_logprob``.
        """
        teacher = TeacherHead(teacher_input.detach(), teacher_weight.detach(), teacher_bias)
        soft = self.soft(student_input, student_weight, [teacher], labels=true_labels, student_bias=student_bias).loss
        loss = self.weight_soft_loss * soft
        hard = torch.zeros_like(soft)
        if self.weight_hard_loss or self.return_soft_hard_loss:
            hard = self._cross_entropy(student_input, student_weight, true_labels, student_bias).to(soft.dtype)
            loss = loss + self.weight_hard_loss * hard
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss

    def _cross_entropy(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        rows = torch.nonzero(labels != self.ignore_index)[:, 0]
        logprob = linear_logprob(hidden[rows], weight, labels[rows], bias=bias, **self.common).logprob
        return -logprob.sum() / max(1, rows.numel())


class LigerFusedLinearJSD(nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearJSD`` on this package's op.

    Args:
        jsd_beta: 0 forward KL, 1 reverse KL, between them the teacher's share of the JSD's mixture.
        ignore_index: label of the tokens that do not count.
        temperature: divides both models' logits.
        accum_dtype: accepted, without effect: sums are float32.
        options: keyword arguments of ``LinearDivergence``.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        rule = from_trl_beta(jsd_beta)
        self.divergence = LinearDivergence(ignore_index=ignore_index, temperature=temperature, **rule, **options)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The mean divergence, a scalar: [N, d_s], [V, d_s], [N, d_t], [V, d_t] and [N] int64 or
        None, where every token counts."""
        teacher = TeacherHead(teacher_input.detach(), teacher_weight.detach())
        output: DivergenceOutput = self.divergence(student_input, student_weight, [teacher], labels=shift_labels)
        return output.loss


def trl_chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    *,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``trl.trainer.distillation_trainer._chunked_divergence_loss`` on this package's op.

    As there, the products run in autocast's dtype where it is on, else in that of the hidden states.

    Args:
        student_hidden_states: [B, T, d_s], aligned with the completion tokens.
        teacher_hidden_states: [B, T, d_t].
        student_lm_head_weight: [V, d_s]; a ``DTensor`` is gathered once, and its gradient averaged over the ranks.
        teacher_lm_head_weight: [V, d_t].
        completion_mask: [B, T], 1 where a token counts.
        beta: 0 forward KL, 1 reverse KL, between them JSD.
        num_items_in_batch: denominator of the loss, default the tokens that count; 1 in place of 0.
        student_lm_head_bias, teacher_lm_head_bias: [V] or None.
        student_logit_scale, teacher_logit_scale: factors of the logits.
        student_final_logit_softcapping, teacher_final_logit_softcapping: caps of the logits, or None.
        temperature: divides both models' logits.
        vocab_size: number of valid leading columns; needed when the heads differ in width.
        workspace_bytes: as in ``linear_divergence``.

    Returns:
        (loss, sum of the student's entropies, number of tokens that count).

    Raises:
        ValueError: as ``linear_divergence``.
    """
    hidden, teacher_hidden = flat(student_hidden_states), flat(teacher_hidden_states).detach()
    dtype, teacher_dtype = product_dtype(hidden), product_dtype(teacher_hidden)
    hidden, teacher_hidden = hidden.to(dtype), teacher_hidden.to(teacher_dtype)
    weight = whole(student_lm_head_weight).to(dtype)
    teacher_weight = whole(teacher_lm_head_weight).detach().to(teacher_dtype)
    counted = completion_mask.flatten() != 0
    output = linear_divergence(
        hidden,
        weight,
        [
            TeacherHead(
                teacher_hidden,
                teacher_weight,
                whole(teacher_lm_head_bias),
                teacher_logit_scale,
                teacher_final_logit_softcapping,
            )
        ],
        **from_trl_beta(beta),
        token_weight=counted.float(),
        temperature=temperature,
        stats=True,
        vocab_size=vocab_size,
        workspace_bytes=workspace_bytes,
        student_bias=whole(student_lm_head_bias),
        student_logit_scale=student_logit_scale,
        student_softcap=student_final_logit_softcapping,
    )
    assert output.stats is not None
    tokens = counted.sum()
    items = tokens if num_items_in_batch is None else num_items_in_batch
    return output.loss / (items + (items == 0)), torch.where(counted, output.stats.student_entropy, 0.0).sum(), tokens


def flat(hidden: Tensor) -> Tensor:
    """[N, d] rows of hidden states with any leading axes."""
    return hidden.flatten(0, -2) if hidden.dim() > 2 else hidden


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer multiplies in: autocast's dtype within it, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def whole(tensor: Tensor | None) -> Any:
    """A plain tensor, from a ``DTensor`` by one gather; the gradient is averaged over its ranks, as FSDP2 does."""
    if tensor is None or not hasattr(tensor, "full_tensor"):
        return tensor
    if not tensor.requires_grad:
        return tensor.full_tensor()
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    # Every rank has the gradient of its own tokens.
    gathered = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered
