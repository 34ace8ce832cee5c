"""The Triton row kernels on a CPU: ``triton_cases.py`` in processes with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd_kernels import linear_divergence, linear_logprob, token_stats
from opd_kernels.row_ops import choose_impl

CASES = Path(__file__).with_name("triton_cases.py")
GROUPS = {
    "divergences": "test_divergence or test_reductions",
    "weights": "test_weights",
    "others": "not test_divergence and not test_reductions and not test_weights",
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these cases on the device")


@pytest.mark.parametrize("group", GROUPS)
def test_cases(group):
    """Triton decides when it is imported whether it interprets, so the cases need their own
    process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", CASES]
    run = subprocess.run(
        [*command, "-k", GROUPS[group]],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_cpu_tensors_need_the_interpreter(make_case):
    case = make_case(1, dtype=torch.float32)
    calls = [
        lambda: linear_divergence(*case.student, case.teachers, impl="triton"),
        lambda: token_stats(*case.student, case.teachers, impl="triton"),
        lambda: linear_logprob(*case.student, case.labels, impl="triton"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="needs CUDA tensors, got device 'cpu': use impl='torch'"):
            call()


def test_float64_is_refused(make_case):
    case = make_case(1)
    with pytest.raises(ValueError, match=r"float32, not in torch\.float64: use 'torch' or 'reference'"):
        linear_divergence(*case.student, case.teachers, impl="triton")


def test_auto():
    assert choose_impl("auto", "cpu", torch.float32) == "torch"
    assert choose_impl("auto", "cuda", torch.float32) == "triton"
    assert choose_impl("auto", "cuda", torch.float64) == "torch"
