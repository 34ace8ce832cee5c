"""Bad input raises a ValueError that names the value and the remedy, before any work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_kernels import TeacherHead, linear_divergence, linear_logprob, token_stats


def call(case, **changes):
    student_hidden = changes.pop("student_hidden", case.hidden)
    student_weight = changes.pop("student_weight", case.weight)
    teachers = changes.pop("teachers", case.teachers)
    return linear_divergence(student_hidden, student_weight, teachers, **changes)


BAD = {
    "divergence": (lambda c: {"divergence": "kl"}, "divergence='kl'.*'reverse_kl'"),
    "reduction": (lambda c: {"reduction": "batchmean"}, "reduction='batchmean'"),
    "teacher_reduction": (lambda c: {"teacher_reduction": "mean"}, "teacher_reduction='mean'"),
    "impl": (lambda c: {"impl": "cuda"}, "impl='cuda'"),
    "triton": (lambda c: {"impl": "triton"}, "impl='triton'.*'torch'"),
    "group": (lambda c: {"group": object()}, "group is object: pass a torch.distributed.ProcessGroup"),
    "jsd_beta 0": (lambda c: {"divergence": "jsd", "jsd_beta": 0.0}, "jsd_beta=0.0.*forward_kl.*reverse_kl"),
    "jsd_beta 1": (lambda c: {"divergence": "jsd", "jsd_beta": 1.0}, "jsd_beta=1.0.*forward_kl.*reverse_kl"),
    "jsd_beta nan": (lambda c: {"divergence": "jsd", "jsd_beta": float("nan")}, "jsd_beta=nan"),
    "jsd_beta text": (lambda c: {"divergence": "jsd", "jsd_beta": "0.5"}, "jsd_beta='0.5' must be a number"),
    "skew_alpha None": (lambda c: {"divergence": "skew_kl", "skew_alpha": None}, "skew_alpha=None must be a number"),
    "jsd_beta unused": (lambda c: {"jsd_beta": 0.3}, "jsd_beta=0.3 has no effect"),
    "skew_alpha": (lambda c: {"divergence": "skew_kl", "skew_alpha": 1.0}, "skew_alpha=1.0"),
    "skew_alpha unused": (lambda c: {"skew_alpha": 0.3}, "skew_alpha=0.3 has no effect"),
    "temperature": (lambda c: {"temperature": 0.0}, "temperature=0.0"),
    "softcap": (lambda c: {"student_softcap": -1.0}, "student_softcap=-1.0"),
    "scale": (lambda c: {"student_logit_scale": float("inf")}, "student_logit_scale=inf"),
    "hidden 3-D": (lambda c: {"student_hidden": c.hidden[None]}, r"student_hidden must be \[N, d\].*flatten"),
    "hidden dtype": (lambda c: {"student_hidden": c.hidden.long()}, "student_hidden has dtype torch.int64"),
    "mixed dtypes": (lambda c: {"student_weight": c.weight.float()}, "student_weight is torch.float32.*cast"),
    "no width": (lambda c: {"student_hidden": c.hidden[:, :0]}, r"student_hidden is empty, shape \[11, 0\]"),
    "no columns": (lambda c: {"student_weight": c.weight[:0]}, r"student_weight is empty, shape \[0, 6\]"),
    "hidden list": (lambda c: {"student_hidden": c.hidden.tolist()}, "student_hidden must be a torch.Tensor.*got list"),
    "weight module": (lambda c: {"student_weight": torch.nn.Linear(6, 37)}, "student_weight must be.*got Linear"),
    "bias list": (lambda c: {"student_bias": [0.0] * 37}, "student_bias must be a torch.Tensor.*got list"),
    "width": (lambda c: {"student_weight": c.weight[:, :4].contiguous()}, "hidden size 4.*6"),
    "contiguity": (lambda c: {"student_weight": c.weight.t().contiguous().t()}, "student_weight.*contiguous"),
    "expanded": (lambda c: {"student_hidden": c.hidden[:1].expand(11, 6)}, "student_hidden.*contiguous"),
    "device": (lambda c: {"student_weight": c.weight.to("meta")}, "student_weight is on meta"),
    "not a sequence": (lambda c: {"teachers": c.teachers[0]}, r"sequence of TeacherHead.*\[teacher\]"),
    "no teacher": (lambda c: {"teachers": []}, "holds 0 heads"),
    "nine teachers": (lambda c: {"teachers": c.teachers * 5}, "holds 10 heads: pass 1 to 8"),
    "tuple": (lambda c: {"teachers": [(c.hidden, c.weight)]}, r"teachers\[0\] is tuple"),
    "teacher rows": (
        lambda c: {"teachers": [c.teachers[0], replace(c.teachers[1], hidden=c.teachers[1].hidden[:5])]},
        r"teachers\[1\]\.hidden has 5 rows, student_hidden 11",
    ),
    "teacher device": (
        lambda c: {"teachers": [TeacherHead(c.hidden.detach().to("meta"), c.weight.detach().to("meta"))]},
        r"teachers\[0\] is on meta",
    ),
    "teacher gradient": (
        lambda c: {"teachers": [TeacherHead(c.hidden * 2, c.weight)]},
        r"teachers\[0\]\.hidden requires a gradient.*detach",
    ),
    "teacher softcap": (
        lambda c: {"teachers": [replace(c.teachers[0], softcap=0.0)]},
        r"teachers\[0\]\.softcap=0.0",
    ),
    "vocabulary": (
        lambda c: {"teachers": [replace(c.teachers[0], weight=c.teachers[0].weight[:30])]},
        r"student 37, teachers \[30\].*vocab_size=",
    ),
    "vocab_size": (lambda c: {"vocab_size": 38}, r"vocab_size=38 must be an integer in \[1, 37\]"),
    "bias shape": (lambda c: {"student_bias": torch.zeros(5)}, r"student_bias must have shape \[37\]"),
    "bias nan": (lambda c: {"student_bias": torch.full((37,), torch.nan)}, "student_bias holds NaN"),
    "mix number": (lambda c: {"mix": 0.5}, "mix=0.5 is no list of numbers.*pass K weights"),
    "mix None": (lambda c: {"mix": [None, 1.0]}, r"mix=\[None, 1.0\] is no list of numbers"),
    "mix ragged": (lambda c: {"mix": [[1.0], [2.0, 3.0]]}, "is no list of numbers"),
    "mix length": (lambda c: {"mix": [1.0]}, r"mix has shape \[1\]: pass \[K\] = \[2\]"),
    "mix rows": (lambda c: {"mix": torch.ones(10, 2)}, r"mix has shape \[10, 2\]"),
    "mix negative": (lambda c: {"mix": torch.tensor([0.5, -0.5])}, r"mix\[0, 1\] = -0.5"),
    "mix nan": (lambda c: {"mix": torch.tensor([0.5, torch.nan])}, r"mix\[0, 1\] = nan"),
    "mix gradient": (lambda c: {"mix": torch.ones(2).requires_grad_()}, "mix requires a gradient"),
    "token_weight shape": (lambda c: {"token_weight": torch.ones(3)}, r"token_weight must have shape \[11\]"),
    "token_weight dtype": (lambda c: {"token_weight": torch.ones(11).bool()}, r"token_weight\.float\(\)"),
    "token_weight nan": (lambda c: {"token_weight": torch.full((11,), torch.nan)}, r"token_weight\[0\] = nan"),
    "token_weight sum": (
        lambda c: {"token_weight": -torch.ones(11), "reduction": "mean"},
        r"sums to -11.*reduction='mean'",
    ),
    "labels dtype": (lambda c: {"labels": c.labels.int()}, "labels has dtype torch.int32: pass int64"),
    "labels range": (lambda c: {"labels": c.labels + 37}, r"labels\[0\] = \d+ is outside \[0, 37\)"),
    "labels ignored": (lambda c: {"labels": c.labels * 0 - 100}, "labels.*-100.*token_weight 0"),
    "budget type": (lambda c: {"workspace_bytes": 1.5}, "workspace_bytes=1.5"),
    "budget": (lambda c: {"workspace_bytes": 100}, r"workspace_bytes=100 cannot hold.*>= \d+"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(make_case, name):
    changes, message = BAD[name]
    case = make_case(2)
    with FlopCounterMode(display=False) as counter, pytest.raises(ValueError, match=message):
        call(case, **changes(case))
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("teacher_reduction", ["sum", "mixture"])
def test_teacher_that_is_not_finite_is_named(make_case, impl, value, divergence, teacher_reduction):
    case = make_case(2)
    case.teachers[1].hidden[7, 0] = value
    case.teachers[1].hidden[9] = value
    options = {"divergence": divergence, "teacher_reduction": teacher_reduction, "impl": impl}
    with pytest.raises(ValueError, match=r"teachers\[1\] has NaN or inf logits, first at row 7"):
        call(case, mix=torch.ones(11, 2), **options)
    with pytest.raises(ValueError, match=r"teachers\[1\].*row 7"):
        token_stats(*case.student, case.teachers, impl=impl)


def test_teacher_whose_factor_overflows_is_named(make_case):
    """Its product is finite, its logits are not."""
    case = make_case(2, dtype=torch.float32)
    case.teachers[1] = replace(case.teachers[1], logit_scale=1e39)
    with pytest.raises(ValueError, match=r"teachers\[1\] has NaN or inf logits, first at row 0"):
        call(case, mix=torch.ones(11, 2))


def test_a_softcap_makes_an_infinite_product_finite(make_case):
    """The other teacher is to blame."""
    case = make_case(2, dtype=torch.float32)
    big = [x.abs() * 1e20 + 1e20 for x in (case.teachers[0].hidden, case.teachers[0].weight)]
    case.teachers[0] = TeacherHead(*big, softcap=5.0)
    assert call(case, mix=torch.ones(11, 2)).loss.isfinite()
    case.teachers[1].hidden[4] = torch.nan
    with pytest.raises(ValueError, match=r"teachers\[1\] has NaN or inf logits, first at row 4"):
        call(case, mix=torch.ones(11, 2))


def test_first_row_is_named_in_the_callers_order(make_case):
    """Rows are regrouped by their teachers inside; the error speaks of the rows that were passed."""
    case = make_case(2)
    case.teachers[1].hidden[4] = torch.nan
    case.teachers[1].hidden[6] = torch.nan
    mix = torch.ones(11, 2)
    mix[6, 0] = 0.0
    with pytest.raises(ValueError, match=r"teachers\[1\].*row 4"):
        call(case, mix=mix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 37, 1])}, r"labels\[1\] = 37 is outside"),
        ({"labels": torch.tensor([0, 1])}, r"labels must have shape \[3\]"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
        ({"group": object()}, "group is object"),
        ({"vocab_size": 99}, "vocab_size=99"),
        ({"workspace_bytes": 10}, "workspace_bytes=10"),
    ],
)
def test_bad_logprob_input(make_case, changes, message):
    case = make_case(rows=3)
    options = {"labels": torch.tensor([0, 1, 2]), **changes}
    with pytest.raises(ValueError, match=message):
        linear_logprob(*case.student, **options)
