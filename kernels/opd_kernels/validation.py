"""Every check of the public arguments, made before any work: a ``ValueError`` that states the
value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .chunking import default_workspace_bytes
from .problem import Head, Problem, Rule, Sampling
from .selection import capturing
from .shards import Shards, check_group, make_shards
from .types import DIVERGENCES, IMPLS, MAX_TEACHERS, REDUCTIONS, TEACHER_REDUCTIONS, TeacherHead

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless a value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be a finite number greater than 0")


def make_sampling(share: float, seed: int) -> Sampling | None:
    """Check ``vocab_sample`` and ``sample_seed``; None for a share of 0."""
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not number or not (math.isfinite(share) and 0 <= share < 1):
        raise ValueError(
            f"vocab_sample={share!r} must lie in [0, 1): the share of the columns from which gradients are computed, "
            "0 for all of them"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"sample_seed={seed!r} must be an integer: another one in every step")
    return Sampling(float(share), seed) if share else None


def check_matrix(name: str, tensor: object, dims: str) -> Tensor:
    """A dense, row-major 2-D tensor of a supported dtype; hidden states, [N, d], may have no rows."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor {dims}, got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must be {dims}, got shape {list(tensor.shape)}: flatten leading axes with .flatten(0, -2)"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}: use float32, bfloat16, float16 or float64")
    if tensor.shape[1] == 0 or (tensor.shape[0] == 0 and dims != "[N, d]"):
        raise ValueError(f"{name} is empty, shape {list(tensor.shape)}: pass a matrix {dims}")
    if (tensor.stride(1) != 1 and tensor.shape[1] > 1) or (tensor.stride(0) < tensor.shape[1] and tensor.shape[0] > 1):
        raise ValueError(f"{name} is not row-major, strides {tensor.stride()}: pass {name}.contiguous()")
    return tensor


def check_vector(name: str, tensor: object, length: int, device: torch.device, integer: bool = False) -> Tensor:
    """A dense [length] tensor on ``device``: int64 with ``integer``, else floating point. What is strided or
    expanded is copied: row kernels step through it by one element."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor [{length}], got {type(tensor).__name__}")
    if tuple(tensor.shape) != (length,):
        raise ValueError(f"{name} must have shape [{length}], got {list(tensor.shape)}")
    if integer and tensor.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {tensor.dtype}: pass int64 token ids")
    if not integer and not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}: pass {name}.float()")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the student on {device}: move it there")
    return tensor.contiguous()


def check_constant(name: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor wants a gradient that no op computes."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which this op does not compute: pass {name}.detach()")


def make_head(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> Head:
    """Check one head on its own; ``vocab`` is the width of its weight."""
    check_matrix(f"{name}hidden", hidden, "[N, d]")
    check_matrix(f"{name}weight", weight, "[V, d]")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}weight has hidden size {weight.shape[1]}, {name}hidden has {hidden.shape[1]}: "
            "pass the head that belongs to these hidden states, as [V, d]"
        )
    stored = weight.dtype
    if weight.dtype == torch.float32 and hidden.dtype in HALVES:
        weight = weight.detach().to(hidden.dtype)
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"{name}weight is {weight.dtype}, {name}hidden is {hidden.dtype}: cast one to the dtype of the other"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name}weight is on {weight.device}, {name}hidden on {hidden.device}: use one device")
    check_positive(f"{name}logit_scale", scale)
    if softcap is not None:
        check_positive(f"{name}softcap", softcap)
    floor = False
    if bias is not None:
        bias = check_vector(f"{name}bias", bias, weight.shape[0], hidden.device)
        blind = capturing(bias.device)
        if not blind and bool((torch.isnan(bias) | torch.isposinf(bias)).any()):
            raise ValueError(
                f"{name}bias holds NaN or +inf: only finite values and -inf (a column switched off) are allowed"
            )
        floor = softcap is None and (blind or bool(torch.isneginf(bias).any()))
    cap = None if softcap is None else float(softcap)
    return Head(hidden, weight, bias, float(scale), cap, float(temperature), weight.shape[0], floor, stored)


def make_student(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> Head:
    """Check the student's tensors and constants, and the temperature."""
    check_positive("temperature", temperature)
    return make_head("student_", hidden, weight, bias, scale, softcap, temperature)


def make_teachers(teachers: Sequence[TeacherHead], student: Head) -> tuple[Head, ...]:
    """Check the teachers against the student's rows and device."""
    if isinstance(teachers, TeacherHead) or not isinstance(teachers, Sequence):
        raise ValueError(f"teachers must be a sequence of TeacherHead, got {type(teachers).__name__}: pass [teacher]")
    if not 1 <= len(teachers) <= MAX_TEACHERS:
        raise ValueError(f"teachers holds {len(teachers)} heads: pass 1 to {MAX_TEACHERS}")
    heads = []
    for k, teacher in enumerate(teachers):
        if not isinstance(teacher, TeacherHead):
            raise ValueError(f"teachers[{k}] is {type(teacher).__name__}: pass TeacherHead(hidden, weight)")
        head = make_head(
            f"teachers[{k}].",
            teacher.hidden,
            teacher.weight,
            teacher.bias,
            teacher.logit_scale,
            teacher.softcap,
            student.temperature,
        )
        check_constant(f"teachers[{k}].hidden", teacher.hidden)
        if head.hidden.shape[0] != student.hidden.shape[0]:
            raise ValueError(
                f"teachers[{k}].hidden has {head.hidden.shape[0]} rows, student_hidden {student.hidden.shape[0]}: "
                "row n of both must belong to the same predicted token"
            )
        if head.hidden.device != student.hidden.device:
            raise ValueError(
                f"teachers[{k}] is on {head.hidden.device}, the student on {student.hidden.device}: use one device"
            )
        heads.append(head)
    return tuple(heads)


def align_vocabularies(heads: tuple[Head, ...], vocab_size: int | None) -> tuple[Head, ...]:
    """Apply ``vocab_size`` to every head; without it all widths must be equal."""
    widths = [head.weight.shape[0] for head in heads]
    if vocab_size is None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"the heads have different vocabulary widths, student {widths[0]}, teachers {widths[1:]}: pass "
                "vocab_size= with the number of valid leading columns, for example len(tokenizer)"
            )
        return heads
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= min(widths):
        raise ValueError(
            f"vocab_size={vocab_size!r} must be an integer in [1, {min(widths)}], the narrowest head of {widths}"
        )
    return tuple(replace(head, vocab=vocab_size) for head in heads)


def split_vocabularies(
    heads: tuple[Head, ...], vocab_size: int | None, group: Any, settings: object
) -> tuple[tuple[Head, ...], Shards | None]:
    """``align_vocabularies``, and the split over the ranks of ``group`` if there is one; then a
    head's ``vocab`` counts the valid columns of its shard."""
    if not check_group(group):
        return align_vocabularies(heads, vocab_size), None
    tensors = [(h.weight.dtype, h.weight.shape[1], h.scale, h.softcap, h.temperature) for h in heads]
    asked = [x is not None and x.requires_grad for x in (heads[0].hidden, heads[0].weight, heads[0].bias)]
    shards = make_shards(
        group,
        [head.weight.shape[0] for head in heads],
        vocab_size,
        heads[0].hidden.shape[0],
        (settings, vocab_size, tensors, asked, torch.is_grad_enabled()),
        heads[0].hidden.device,
    )
    return tuple(replace(head, vocab=shards.local) for head in heads), shards


def make_rule(divergence: str, jsd_beta: float, skew_alpha: float) -> Rule:
    """Check the divergence and its parameter."""
    check_choice("divergence", divergence, DIVERGENCES)
    for name, value in (("jsd_beta", jsd_beta), ("skew_alpha", skew_alpha)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name}={value!r} must be a number strictly between 0 and 1")
    if not 0.0 < jsd_beta < 1.0:
        raise ValueError(
            f"jsd_beta={jsd_beta} must lie strictly between 0 and 1; the limits are not a KL divergence: "
            "use divergence='forward_kl' (TRL's beta 0) or 'reverse_kl' (TRL's beta 1)"
        )
    if not 0.0 < skew_alpha < 1.0:
        raise ValueError(
            f"skew_alpha={skew_alpha} must lie strictly between 0 and 1; at 0 use divergence='forward_kl', "
            "at 1 the divergence is constant 0"
        )
    if divergence != "jsd" and jsd_beta != 0.5:
        raise ValueError(f"jsd_beta={jsd_beta} has no effect on divergence={divergence!r}: leave it out or use 'jsd'")
    if divergence != "skew_kl" and skew_alpha != 0.1:
        raise ValueError(
            f"skew_alpha={skew_alpha} has no effect on divergence={divergence!r}: leave it out or use 'skew_kl'"
        )
    return Rule(divergence, float(jsd_beta), float(skew_alpha))


def make_mix(
    mix: Tensor | Sequence[float] | None, rows: int, teachers: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, bool, int | None]:
    """Weights [N, K] in the compute dtype, whether all rows are the same, and, where the host knows it, the bits of the
    teachers that have a weight: then no check needs to wait for the device."""
    if mix is None:
        equal = torch.full((1, teachers), 1.0 / teachers, dtype=dtype, device=device)
        return equal.expand(rows, teachers), True, (1 << teachers) - 1
    if not isinstance(mix, Tensor):
        mix = mix_of_numbers(mix, dtype, device)
    if tuple(mix.shape) not in ((teachers,), (rows, teachers)):
        raise ValueError(f"mix has shape {list(mix.shape)}: pass [K] = [{teachers}] or [N, K] = [{rows}, {teachers}]")
    if not mix.is_floating_point():
        raise ValueError(f"mix has dtype {mix.dtype}: pass mix.float()")
    if mix.device != device:
        raise ValueError(f"mix is on {mix.device}, the student on {device}: move it there")
    check_constant("mix", mix)
    mix = mix.detach().to(dtype)
    if mix.dim() == 1:
        return mix.expand(rows, teachers), True, None
    return mix, False, None


def mix_of_numbers(mix: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of numbers, or of lists of them, one list a row."""
    try:
        if mix and not any(isinstance(weight, (Sequence, Tensor)) for weight in mix):
            # Filled on the device: a copy from the host would wait for it.
            return torch.stack([torch.full((), float(weight), dtype=dtype, device=device) for weight in mix])
        return torch.tensor(mix, dtype=dtype, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"mix={mix!r} is no list of numbers ({error}): pass K weights, or a tensor [N, K]") from None


def make_token_weight(
    weight: Tensor | None, rows: int, dtype: torch.dtype, device: torch.device, name: str = "token_weight"
) -> Tensor | None:
    """[N] detached, in the compute dtype; its values are left to ``check_values``."""
    if weight is None:
        return None
    weight = check_vector(name, weight, rows, device)
    check_constant(name, weight)
    return weight.detach().to(dtype)


def check_values(
    mix: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    labels: Tensor | None,
    vocab: int,
    logprob_weight: Tensor | None = None,
    known: bool = False,
) -> None:
    """Checks that read data, with one device synchronisation while everything is in order, and none where there is
    nothing to read; left out while a CUDA graph is captured. ``known``: ``mix`` is in order."""
    if capturing(mix.device) or (known and token_weight is None and logprob_weight is None and labels is None):
        return
    flags = {}
    if not known:
        bad_mix = ~(torch.isfinite(mix) & (mix >= 0))
        flags["mix"] = bad_mix.any()
    if token_weight is not None:
        flags["weight"] = (~torch.isfinite(token_weight)).any()
        if reduction == "mean":
            used = token_weight != 0
            if logprob_weight is not None:
                used = used | (logprob_weight != 0)
            flags["total"] = (token_weight.sum() <= 0) & used.any()
    if logprob_weight is not None:
        flags["logprob"] = (~torch.isfinite(logprob_weight)).any()
    if labels is not None:
        active = (mix > 0).any(1)
        if token_weight is not None:
            active = active & (token_weight != 0)
        if logprob_weight is not None:
            active = active | (logprob_weight != 0)
        bad_label = active & ((labels < 0) | (labels >= vocab))
        flags["label"] = bad_label.any()
    if not bool(torch.stack(list(flags.values())).any()):
        return
    if not known and bool(flags["mix"]):
        row, column = torch.nonzero(bad_mix)[0].tolist()
        raise ValueError(f"mix[{row}, {column}] = {mix[row, column].item()}: weights must be finite and not negative")
    if token_weight is not None and bool(flags["weight"]):
        row = int(torch.nonzero(~torch.isfinite(token_weight))[0])
        raise ValueError(
            f"token_weight[{row}] = {token_weight[row].item()}: weights must be finite; use 0 to skip a row"
        )
    if logprob_weight is not None and bool(flags["logprob"]):
        row = int(torch.nonzero(~torch.isfinite(logprob_weight))[0])
        raise ValueError(
            f"logprob_weight[{row}] = {logprob_weight[row].item()}: weights must be finite; use 0 to leave a row out"
        )
    if token_weight is not None and "total" in flags and bool(flags["total"]):
        raise ValueError(
            f"token_weight sums to {token_weight.sum().item()}, no denominator for reduction='mean': "
            "use reduction='sum' and normalise the weights yourself"
        )
    assert labels is not None
    row = int(torch.nonzero(bad_label)[0])
    raise ValueError(
        f"labels[{row}] = {labels[row].item()} is outside [0, {vocab}): give ignored positions token_weight 0"
    )


def check_labels(labels: object, vocab: int, hidden: Tensor) -> Tensor:
    """[N] or [N, L] int64, dense, L at least 1, every label a column."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        labels = check_vector("labels", labels, hidden.shape[0], hidden.device, integer=True)
    if labels.shape[0] != hidden.shape[0] or 0 in labels.shape[1:]:
        raise ValueError(f"labels must have shape [{hidden.shape[0]}] or [{hidden.shape[0]}, L], got {[*labels.shape]}")
    check_vector("labels", labels.flatten(), labels.numel(), hidden.device, integer=True)
    bad = (labels < 0) | (labels >= vocab)
    if not capturing(hidden.device) and bool(bad.any()):
        place = torch.nonzero(bad)[0].tolist()
        raise ValueError(
            f"labels{place} = {labels[tuple(place)].item()} is outside [0, {vocab}): pass only rows with a token"
        )
    return labels.contiguous()


def make_workspace_bytes(workspace_bytes: int | None, device: torch.device) -> int:
    """Check the budget of temporaries, or choose that of the device."""
    if workspace_bytes is None:
        return default_workspace_bytes(device)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes={workspace_bytes!r} must be a positive integer")
    return workspace_bytes


def compute_dtype_of(heads: tuple[Head, ...]) -> torch.dtype:
    """float64 when every head is, else float32."""
    return torch.float64 if all(head.weight.dtype == torch.float64 for head in heads) else torch.float32


def make_problem(
    student: Head,
    teachers: Sequence[TeacherHead],
    *,
    divergence: str,
    jsd_beta: float,
    skew_alpha: float,
    teacher_reduction: str,
    mix: Tensor | Sequence[float] | None,
    token_weight: Tensor | None,
    labels: Tensor | None,
    logprob_weight: Tensor | None,
    reduction: str,
    stats: bool,
    workspace_bytes: int | None,
    vocab_size: int | None,
    group: Any = None,
    vocab_sample: float = 0.0,
    sample_seed: int = 0,
) -> Problem:
    """Validate everything and return the normalised problem."""
    check_choice("teacher_reduction", teacher_reduction, TEACHER_REDUCTIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    rule = make_rule(divergence, jsd_beta, skew_alpha)
    sampling = make_sampling(vocab_sample, sample_seed)
    budget = make_workspace_bytes(workspace_bytes, student.hidden.device)
    settings = (rule, teacher_reduction, reduction, stats, labels is None, logprob_weight is None, budget, sampling)
    heads, shards = split_vocabularies((student, *make_teachers(teachers, student)), vocab_size, group, settings)
    student, *others = heads
    dtype, device = compute_dtype_of((student, *others)), student.hidden.device
    if sampling is not None and capturing(device):
        raise ValueError(
            f"vocab_sample={vocab_sample}: every replay of a CUDA graph would draw the same columns: pass 0 while one "
            "is captured"
        )
    rows = student.hidden.shape[0]
    weights, uniform, known = make_mix(mix, rows, len(others), dtype, device)
    token_weight = make_token_weight(token_weight, rows, dtype, device)
    logprob_weight = make_token_weight(logprob_weight, rows, dtype, device, "logprob_weight")
    if logprob_weight is not None and labels is None:
        raise ValueError("logprob_weight needs labels=, the tokens whose log-probs it weighs")
    if labels is not None:
        labels = check_vector("labels", labels, rows, device, integer=True)
    vocab = student.vocab if shards is None else shards.vocab
    check_values(weights, token_weight, reduction, labels, vocab, logprob_weight, known is not None)
    mixture = teacher_reduction == "mixture"
    if mixture:
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total > 0, weights / total, weights)
    return Problem(
        student=student,
        teachers=tuple(others),
        rule=rule,
        mixture=mixture and len(others) > 1,
        mix=weights,
        mix_is_uniform=uniform,
        token_weight=token_weight,
        labels=labels,
        logprob_weight=logprob_weight,
        reduction=reduction,
        stats=stats,
        workspace_bytes=budget,
        compute_dtype=dtype,
        shards=shards,
        sampling=sampling,
        known_teachers=known,
    )


def check_impl(impl: str) -> None:
    """Raise ValueError unless there is such an implementation."""
    check_choice("impl", impl, IMPLS)
