"""The ops as ``torch.library`` custom ops, so that ``torch.compile`` and ``torch.export`` see one
opaque node each.

``linear_divergence``, ``linear_logprob`` and ``token_stats`` come here only while they are compiled;
in eager mode they go straight to their autograd functions, without the dispatcher's cost. Compiled
and eager calls run the same code on the same tensors. Checks that read data raise when the compiled
function runs. ``impl="reference"`` is plain torch and is not wrapped.

Gradients that are known in forward are outputs of the forward op, scaled in backward; for
``reduction="none"`` and log-probs a backward op recomputes the logits (and the noise of sampled
columns, which eager fills in during that backward pass, stays NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .call import StudentArguments, exact_products, loss_scales, prepare, recompute, recorded, solve
from .driver import Outcome
from .heads import Wants
from .label_sets import LabelSets, Upstream
from .logprob_call import STATS_OPTIONS, compute_stats, prepare_logprob
from .problem import Problem
from .types import DivergenceOutput, LogprobOutput, SampleReport, TeacherHead, TokenStats
from .validation import check_constant

NO_GRADIENTS = (False, False, False)
STATISTICS = [f.name for f in fields(TokenStats)]

# An empty teacher bias is none; scales and softcaps are the student's, then every teacher's, a softcap
# of 0 is none.
HEADS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor[] teacher_hidden, "
    "Tensor[] teacher_weight, Tensor[] teacher_bias, float[] scales, float[] softcaps, Tensor? mix, "
    "Tensor? token_weight, Tensor? labels"
)
RULE = (
    "str divergence, float jsd_beta, float skew_alpha, str teacher_reduction, str reduction, bool stats, "
    "float vocab_sample, int sample_seed, Tensor? logprob_weight"
)
RUN = "float temperature, str impl, int? workspace_bytes, int? vocab_size, str group_name"
DIVERGENCE = f"{HEADS}, {RULE}, {RUN}, bool[] wants"
STATS = f"{HEADS}, {RUN}"
LOGPROB = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float logit_scale, float? softcap, bool tail, "
    f"{RUN}, bool[] wants"
)

Arguments = dict[str, Any]


def define(
    name: str, arguments: str, run: Callable[[Arguments], list[Tensor]], fake: Callable[[Arguments], list[Tensor]]
) -> Callable[..., list[Tensor]]:
    """Register ``opd_kernels::name``; ``run`` and ``fake`` get its arguments by name, the op that is
    returned takes them in order."""
    names = names_of(arguments)
    op = torch.library.custom_op(
        f"opd_kernels::{name}",
        lambda *values: run(dict(zip(names, values, strict=True))),
        mutates_args=(),
        schema=f"({arguments}) -> Tensor[]",
        # Checks and row selection read data on the host.
        tags=[torch.Tag.cudagraph_unsafe],  # a list: torch 2.11 takes no single one
    )
    op.register_fake(lambda *values: fake(dict(zip(names, values, strict=True))))
    return op


def names_of(arguments: str) -> list[str]:
    """The names in the arguments of a schema, in order."""
    return [argument.split()[-1] for argument in arguments.split(", ")]


def run_divergence(given: Arguments) -> list[Tensor]:
    """[loss, token_loss, log-probs (or empty), report of the sampling (or empty), statistics (all or none of them,
    absent ones empty), three gradients]."""
    problem = problem_of(given)
    loss, outcome = solve(problem, loss_scales(problem), Wants(*given["wants"]))
    logprob = loss.new_empty(0) if outcome.logprob is None else outcome.logprob
    found = [] if outcome.stats is None else present(outcome.stats, loss)
    return [
        loss,
        outcome.token_loss,
        logprob,
        loss.new_empty(0) if outcome.report is None else outcome.report,
        *found,
        *gradients_of(outcome, given["student_hidden"], given["student_weight"], given["group_name"]),
    ]


def fake_divergence(given: Arguments) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of :func:`run_divergence`."""
    hidden, dtype = given["student_hidden"], compute_dtype(given)
    whole, rows = given["reduction"] == "none", hidden.shape[0]
    found = empty_stats(given) if given["stats"] else []
    gradients = empty_gradients(given, NO_GRADIENTS if whole else given["wants"])
    loss = hidden.new_empty((rows,) if whole else (), dtype=dtype)
    logprob = hidden.new_empty(0 if given["logprob_weight"] is None else rows, dtype=dtype)
    report = hidden.new_empty(4 if reports(given) else 0, dtype=dtype)
    return [loss, hidden.new_empty(rows, dtype=dtype), logprob, report, *found, *gradients]


def reports(given: Arguments) -> bool:
    """Whether the noise of sampled columns is reported."""
    return given["vocab_sample"] > 0 and any(given["wants"])


def run_divergence_backward(given: Arguments) -> list[Tensor]:
    """Three gradients for the upstream gradient ``grad_loss`` [N] of ``reduction="none"``."""
    problem = problem_of(given)
    outcome = recompute(problem, loss_scales(problem), given["grad_loss"], Wants(*given["wants"]))
    return gradients_of(outcome, given["student_hidden"], given["student_weight"], given["group_name"])


def run_logprob(given: Arguments) -> list[Tensor]:
    """[log-probs [N, L], log-mass of the tail, entropy, largest probability]."""
    with exact_products(given["hidden"].device):
        # Outputs of a custom op must not share storage.
        return [x.clone() for x in logprob_call_of(given).forward()]


def fake_logprob(given: Arguments) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of :func:`run_logprob`."""
    hidden, labels, dtype = given["hidden"], given["labels"], compute_dtype(given)
    rows, width = hidden.shape[0], labels.shape[1] if labels.dim() == 2 else 1
    return [hidden.new_empty(rows, width, dtype=dtype), *(hidden.new_empty(rows, dtype=dtype) for _ in range(3))]


def run_logprob_backward(given: Arguments) -> list[Tensor]:
    """Three gradients for the upstream ones of log-probs [N, L], tail [N] and entropy [N], of which any may be None."""
    call = logprob_call_of(given)
    tail = given["tail_value"]
    gradients = (given["grad_logprob"], given["grad_entropy"], given["grad_tail"])
    upstream = Upstream.of(*gradients, like=call.labels, dtype=tail.dtype)
    with exact_products(given["hidden"].device):
        outcome = call.backward(tail, upstream, Wants(*given["wants"]))
    return gradients_of(outcome, given["hidden"], given["weight"], given["group_name"])


def run_stats(given: Arguments) -> list[Tensor]:
    """All statistics in the order of ``TokenStats``, absent ones empty."""
    problem = problem_of({**given, **STATS_OPTIONS})
    return present(compute_stats(problem), problem.mix)


def fake_gradients(given: Arguments) -> list[Tensor]:
    """Empty tensors in place of the gradients that a backward op returns."""
    return empty_gradients(given, given["wants"])


linear_divergence_op = define("linear_divergence", DIVERGENCE, run_divergence, fake_divergence)
linear_divergence_backward_op = define(
    "linear_divergence_backward", f"Tensor grad_loss, {DIVERGENCE}", run_divergence_backward, fake_gradients
)
linear_logprob_op = define("linear_logprob", LOGPROB, run_logprob, fake_logprob)
linear_logprob_backward_op = define(
    "linear_logprob_backward",
    f"Tensor? grad_logprob, Tensor? grad_tail, Tensor? grad_entropy, Tensor tail_value, {LOGPROB}",
    run_logprob_backward,
    fake_gradients,
)
token_stats_op = define("token_stats", STATS, run_stats, lambda given: empty_stats(given))


class Saved:
    """Arguments of an op: ``tensors`` for ``save_for_backward``, and what joins them again."""

    def __init__(self, values: Sequence[Any]) -> None:
        leaves, self.spec = pytree.tree_flatten(list(values))
        self.tensors = [x for x in leaves if isinstance(x, Tensor)]
        self.rest = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]

    def join(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The arguments again, with these tensors in their places."""
        stream = iter(tensors)
        joined: list[Any] = pytree.tree_unflatten([next(stream) if x is _TENSOR else x for x in self.rest], self.spec)
        return joined


_TENSOR = object()


def divergence_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep what :func:`divergence_backward` needs: the gradients, or with ``reduction="none"`` the arguments."""
    given = dict(zip(names_of(DIVERGENCE), inputs, strict=True))
    ctx.set_materialize_grads(False)
    ctx.wants, ctx.dtypes = given["wants"], [None if x is None else x.dtype for x in inputs[:3]]
    ctx.teachers, ctx.inputs, ctx.recompute = len(given["teacher_hidden"]), len(inputs), given["reduction"] == "none"
    ctx.arguments = Saved(inputs) if ctx.recompute else None
    ctx.save_for_backward(*(ctx.arguments.tensors if ctx.recompute else output[-3:]))


def divergence_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """A gradient, or None, for every argument of the op; only that of the loss reaches any."""
    found: Sequence[Tensor | None] = (None, None, None)
    grad_loss = gradients[0]
    if grad_loss is not None and ctx.recompute:
        found = linear_divergence_backward_op(grad_loss, *ctx.arguments.join(ctx.saved_tensors))
    elif grad_loss is not None:
        # In float32: a factor of 1/3 rounded to bfloat16 is off by 0.2 %.
        found = [(x.to(grad_loss.dtype) * grad_loss).to(x.dtype) for x in ctx.saved_tensors]
    none = [None] * ctx.teachers
    found = recorded(ctx, asked(found, ctx.wants, ctx.dtypes), [grad_loss])
    return *found, none, none, none, *([None] * (ctx.inputs - 6))


def logprob_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep the arguments and the tail, from which :func:`logprob_backward` makes the logits again."""
    ctx.set_materialize_grads(False)
    ctx.wants, ctx.dtypes = inputs[-1], [None if x is None else x.dtype for x in inputs[:3]]
    ctx.arguments = Saved([output[1], *inputs])
    ctx.save_for_backward(*ctx.arguments.tensors)


def logprob_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """A gradient, or None, for every argument of the op; the largest probability passes none on."""
    found: Sequence[Tensor | None] = (None, None, None)
    if any(x is not None for x in gradients[:3]):
        arguments = ctx.arguments.join(ctx.saved_tensors)
        found = linear_logprob_backward_op(*gradients[:3], *arguments)
    found = recorded(ctx, asked(found, ctx.wants, ctx.dtypes), gradients[:3])
    return *found, *([None] * (len(names_of(LOGPROB)) - 3))


linear_divergence_op.register_autograd(divergence_backward, setup_context=divergence_context)  # type: ignore[attr-defined]
linear_logprob_op.register_autograd(logprob_backward, setup_context=logprob_context)  # type: ignore[attr-defined]


def divergence(
    student: StudentArguments, teachers: Sequence[TeacherHead], wants: Wants, options: dict[str, Any]
) -> DivergenceOutput:
    """``linear_divergence`` through its op; ``options`` are its other keyword arguments."""
    given = {**flat(student, teachers, options), "wants": [wants.hidden, wants.weight, wants.bias]}
    out = linear_divergence_op(*[given[name] for name in names_of(DIVERGENCE)])
    found = unpack_stats(out[4:-3], given) if given["stats"] else None
    logprob = None if given["logprob_weight"] is None else out[2].detach()
    report = SampleReport(*out[3].detach().unbind()) if reports(given) else None
    return DivergenceOutput(out[0], out[1].detach(), found, logprob, report)


def stats(student: StudentArguments, teachers: Sequence[TeacherHead], options: dict[str, Any]) -> TokenStats:
    """``token_stats`` through its op; ``options`` are its other keyword arguments."""
    given = flat(student, teachers, options)
    return unpack_stats(token_stats_op(*[given[name] for name in names_of(STATS)]), given)


def logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wants: Wants, options: dict[str, Any]
) -> LogprobOutput:
    """``linear_logprob`` through its op; ``options`` are its other keyword arguments."""
    given = {**options, "hidden": hidden, "weight": weight, "bias": bias, "labels": labels}
    given["group_name"], given["wants"] = name_of(options["group"]), [wants.hidden, wants.weight, wants.bias]
    out = linear_logprob_op(*[given[name] for name in names_of(LOGPROB)])
    values = out[0] if labels.dim() == 2 else out[0][:, 0]
    return LogprobOutput(values, out[2], out[3].detach(), out[1] if options["tail"] else None)


def flat(student: StudentArguments, teachers: Sequence[TeacherHead], options: dict[str, Any]) -> Arguments:
    """The arguments of a public call under the names of the ops."""
    hidden, weight, bias, scale, softcap = student
    mix = options["mix"]
    if mix is not None and not isinstance(mix, Tensor):
        mix = torch.tensor(mix, dtype=torch.float64, device=hidden.device)
    constants = {f"teachers[{k}].hidden": teacher.hidden for k, teacher in enumerate(teachers)}
    # Inside the op no tensor requires a gradient any more.
    weights = {name: options.get(name) for name in ("token_weight", "logprob_weight")}
    for name, tensor in {**constants, **weights, "mix": mix}.items():
        if tensor is not None:
            check_constant(name, tensor)
    return {
        **options,
        "student_hidden": hidden,
        "student_weight": weight,
        "student_bias": bias,
        "teacher_hidden": [teacher.hidden for teacher in teachers],
        "teacher_weight": [teacher.weight for teacher in teachers],
        "teacher_bias": [hidden.new_empty(0) if teacher.bias is None else teacher.bias for teacher in teachers],
        "scales": [scale, *[teacher.logit_scale for teacher in teachers]],
        "softcaps": [softcap or 0.0, *[teacher.softcap or 0.0 for teacher in teachers]],
        "mix": mix,
        "group_name": name_of(options["group"]),
    }


def problem_of(given: Arguments) -> Problem:
    """The validated problem of an op's arguments."""
    scales, caps = given["scales"], [cap or None for cap in given["softcaps"]]
    student = (given["student_hidden"], given["student_weight"], given["student_bias"], scales[0], caps[0])
    biases = [bias if bias.numel() else None for bias in given["teacher_bias"]]
    parts = (given["teacher_hidden"], given["teacher_weight"], biases, scales[1:], caps[1:])
    teachers = [TeacherHead(*head) for head in zip(*parts, strict=True)]
    passed = [*names_of(RULE), "temperature", "impl", "workspace_bytes", "vocab_size", "mix", "token_weight", "labels"]
    return prepare(student, teachers, **{name: given[name] for name in passed}, group=group_of(given["group_name"]))


def logprob_call_of(given: Arguments) -> LabelSets:
    """The validated call of an op's arguments."""
    tensors = (given["hidden"], given["weight"], given["bias"], given["labels"])
    passed = ("logit_scale", "softcap", "tail", "temperature", "impl", "workspace_bytes", "vocab_size")
    return prepare_logprob(*tensors, **{name: given[name] for name in passed}, group=group_of(given["group_name"]))


def name_of(group: Any) -> str:
    """The name under which an op knows a process group; "" for none."""
    return "" if group is None else group.group_name


def group_of(name: str) -> Any:
    """The process group of a name of :func:`name_of`."""
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def compute_dtype(given: Arguments) -> torch.dtype:
    """As ``validation.compute_dtype_of``, before anything is validated."""
    weights = [given["weight"]] if "weight" in given else [given["student_weight"], *given["teacher_weight"]]
    return torch.float64 if all(weight.dtype == torch.float64 for weight in weights) else torch.float32


def stored_dtypes(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, sharded: bool
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """dtypes of the three gradients as ops: those of float16 keep the compute dtype until a loss
    scaler's factor is in, one that is summed over ranks too."""
    states, stored = (dtype if x.dtype == torch.float16 else x.dtype for x in (hidden, weight))
    return dtype if sharded else states, stored, dtype


def gradients_of(outcome: Outcome, hidden: Tensor, weight: Tensor, group_name: str) -> list[Tensor]:
    """hidden, weight and bias gradients; empty where not asked for."""
    like = outcome.token_loss
    found = (outcome.hidden, outcome.weight, outcome.bias)
    dtypes = stored_dtypes(hidden, weight, like.dtype, bool(group_name))
    return [
        like.new_empty(0, dtype=dtype) if x is None else x.to(dtype) for x, dtype in zip(found, dtypes, strict=True)
    ]


def empty_gradients(given: Arguments, wants: Sequence[bool]) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of :func:`gradients_of`."""
    prefix = "" if "weight" in given else "student_"
    tensors = [given[f"{prefix}{name}"] for name in ("hidden", "weight", "bias")]
    dtypes = stored_dtypes(tensors[0], tensors[1], compute_dtype(given), bool(given["group_name"]))
    return [
        tensors[1].new_empty(x.shape if asked else (0,), dtype=dtype)
        for x, asked, dtype in zip(tensors, wants, dtypes, strict=True)
    ]


def asked(
    gradients: Sequence[Tensor | None], wants: Sequence[bool], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Gradients in the dtypes of the inputs, None where not asked for."""
    return [
        x.to(dtype) if want and x is not None else None for x, want, dtype in zip(gradients, wants, dtypes, strict=True)
    ]


def present(found: TokenStats, like: Tensor) -> list[Tensor]:
    """Statistics as an op returns them: absent ones are empty."""
    values = [getattr(found, name) for name in STATISTICS]
    return [like.new_empty(0) if x is None else x for x in values]


def empty_stats(given: Arguments) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of :func:`run_stats`."""
    like = given["student_hidden"].new_empty(0, dtype=compute_dtype(given))
    rows, teachers = given["student_hidden"].shape[0], len(given["teacher_hidden"])
    return present(TokenStats.empty(rows, teachers, given["labels"] is not None, like), like)


def unpack_stats(values: Sequence[Tensor], given: Arguments) -> TokenStats:
    """The statistics from what an op returns; those of labels are None without labels."""
    absent = () if given["labels"] is not None else ("student_logprob", "teacher_logprob", "gap")
    pairs = zip(STATISTICS, values, strict=True)
    return TokenStats(**{name: None if name in absent else value.detach() for name, value in pairs})  # type: ignore[arg-type]
