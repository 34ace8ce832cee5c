"""Fused linear divergences for on-policy distillation: from hidden states and heads, never from
[N, V] logits."""

from . import library as library  # registers the custom ops
from .divergence import from_trl_beta, linear_divergence
from .logprob import linear_logprob, token_stats
from .sparse import topk_divergence
from .types import DivergenceOutput, LMHead, LogprobOutput, SampleReport, TeacherHead, TokenStats

__all__ = [
    "DivergenceOutput",
    "LMHead",
    "LogprobOutput",
    "SampleReport",
    "TeacherHead",
    "TokenStats",
    "from_trl_beta",
    "linear_divergence",
    "linear_logprob",
    "token_stats",
    "topk_divergence",
]
