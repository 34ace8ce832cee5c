"""Prompt log-probs of a server's answer become top-k targets, or are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdengine.teachers.endpoint import BadAnswer
from opdengine.types import TopK
from opdengine.workers.printing import brief, one_line

MOST_ABOVE = 1e-3
"""What rounding may add to a log-prob of 0 and to a probability of 1."""

NOT_A_LOGPROB = -9999.0
"""What servers write in place of -inf, which JSON lacks, and of what they do not know but hold for very unlikely."""

MOST_OUTSIDE = 0.9
"""Probability that a row may give to ids beyond the tokenizer (the padding of a head)."""


def read_top_k(
    choice: Mapping[str, Any], token_ids: np.ndarray, target_positions: np.ndarray, k: int, vocab_size: int
) -> TopK:
    """The distributions at the targets, verified to belong to exactly these token ids.

    vLLM gives the k most likely tokens of every position and the actual token besides where it is
    not among them. Every row keeps at most k: the actual token and the most likely others; what is
    cut off, and what a server leaves out or gives :data:`NOT_A_LOGPROB`, belongs to the tail. Columns
    beyond the tokenizer (the padding of a head) are taken out of the distribution, as the exact loss does.

    Args:
        choice: of the answer; has ``prompt_logprobs``.
        token_ids: int64 [L] that were sent.
        target_positions: int64 [T].
        k: log-probs that were asked for.
        vocab_size: ids of the tokenizer.

    Raises:
        BadAnswer: "no_logprobs", "wrong_ids" or "bad_logprobs"; names the position in the sequence.
    """
    rows, echoed = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise BadAnswer("no_logprobs", "the answer has no prompt_logprobs")
    if echoed is not None and not (isinstance(echoed, list) and echoed == token_ids.tolist()):
        raise BadAnswer("wrong_ids", "the server read other token ids than were sent")
    if len(rows) != len(token_ids):
        raise BadAnswer("wrong_ids", f"{len(rows)} positions with log-probs for {len(token_ids)} token ids")
    for position, (row, token) in enumerate(zip(rows, token_ids.tolist(), strict=True)):
        if position and not (isinstance(row, Mapping) and str(token) in row):
            raise BadAnswer("wrong_ids", f"position {position} has no log-prob of token {token} that was sent there")
    parsed = []
    for position in target_positions.tolist():
        try:
            parsed.append(_row(rows[position], int(token_ids[position]), k, vocab_size))
        except BadAnswer as error:
            raise BadAnswer(error.reason, f"the log-probs at position {position} {error}") from None
    width = max((part.ids.shape[1] for part in parsed), default=k)
    wide = [part.widened(width) for part in parsed]
    return TopK(
        ids=np.array([part.ids[0] for part in wide], dtype=np.int64).reshape(-1, width),
        logprobs=np.array([part.logprobs[0] for part in wide], dtype=np.float32).reshape(-1, width),
    )


def _row(row: Mapping[str, Any], actual: int, k: int, vocab_size: int) -> TopK:
    """One row of at most ``k`` ids, the actual token first, then from likely to unlikely."""
    try:
        ids = np.array([int(token) for token in row], dtype=np.int64)
        values = [entry["logprob"] for entry in row.values()]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise BadAnswer("bad_logprobs", f"cannot be read: {one_line(repr(error), 120)}") from error
    if [str(token) for token in ids] != list(row):
        raise BadAnswer("bad_logprobs", f"have keys that are not plain token ids: {brief(list(row), 60)}")
    if not all(isinstance(value, float) or (type(value) is int and abs(value) < 1e6) for value in values):
        raise BadAnswer("bad_logprobs", f"are not numbers: {brief(values, 60)}")
    logprobs = np.array(values, dtype=np.float64)
    if (logprobs[ids == actual] == NOT_A_LOGPROB).any():
        raise BadAnswer("bad_logprobs", f"hold {NOT_A_LOGPROB:g} for token {actual}, which stands for -inf or unknown")
    told = logprobs != NOT_A_LOGPROB
    ids, logprobs = ids[told], logprobs[told]
    if not (np.isfinite(logprobs).all() and logprobs.max() <= MOST_ABOVE):
        worst = logprobs[~(np.isfinite(logprobs) & (logprobs <= MOST_ABOVE))][0]
        raise BadAnswer("bad_logprobs", f"hold {worst:g}, which is no log-prob")
    mass = np.exp(logprobs).sum()
    if mass > 1 + MOST_ABOVE:
        raise BadAnswer("bad_logprobs", f"sum to a probability of {mass:.6g}")
    if not 0 <= actual < vocab_size:
        raise BadAnswer("wrong_ids", f"are of token {actual}, which is beyond the vocabulary of {vocab_size}")
    if ids.min() < 0:
        raise BadAnswer("wrong_ids", f"hold the token id {ids.min()}")
    known = ids < vocab_size
    outside = np.exp(logprobs[~known]).sum()
    if outside > MOST_OUTSIDE:
        raise BadAnswer(
            "wrong_ids",
            f"give a probability of {outside:.3g} to ids beyond the tokenizer's {vocab_size} (the first is "
            f"{ids[~known][0]}); is another model served?",
        )
    ids, logprobs = ids[known], logprobs[known] - np.log1p(-outside)
    order = np.lexsort((ids, -logprobs, ids != actual))[:k]
    return TopK(ids[None, order], np.minimum(logprobs[order], 0.0)[None].astype(np.float32))
