"""Prompt log-probs of a server's answer become top-k targets, or are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdengine.teachers.endpoint import BadAnswer
from opdengine.types import TopK


def read_top_k(
    choice: Mapping[str, Any], token_ids: np.ndarray, target_positions: np.ndarray, k: int, vocab_size: int
) -> TopK:
    """The distributions at the targets, verified to belong to exactly these token ids.

    vLLM gives the k most likely tokens of every position and the actual token besides where it is
    not among them. Every row is cut to the same width of at most k: the actual token and the most
    likely others; what is cut off belongs to the tail. Columns beyond the tokenizer (the padding of
    a head) are taken out of the distribution, as the exact loss does.

    Args:
        choice: of the answer; has ``prompt_logprobs``.
        token_ids: int64 [L] that were sent.
        target_positions: int64 [T].
        k: log-probs that were asked for.
        vocab_size: ids of the tokenizer.

    Raises:
        BadAnswer: "no_logprobs", "wrong_ids" or "bad_logprobs".
    """
    rows, echoed = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise BadAnswer("no_logprobs", "the answer has no prompt_logprobs")
    if echoed is not None and list(echoed) != token_ids.tolist():
        raise BadAnswer("wrong_ids", "the server read other token ids than were sent")
    if len(rows) != len(token_ids):
        raise BadAnswer("wrong_ids", f"{len(rows)} positions with log-probs for {len(token_ids)} token ids")
    for position, (row, token) in enumerate(zip(rows, token_ids.tolist(), strict=True)):
        if position and not (isinstance(row, Mapping) and str(token) in row):
            raise BadAnswer("wrong_ids", f"position {position} has no log-prob of token {token} that was sent there")
    parsed = [_row(rows[p], int(token_ids[p]), vocab_size) for p in target_positions]
    width = min([k, *(len(ids) for ids, _ in parsed)])
    return TopK(
        ids=np.array([ids[:width] for ids, _ in parsed], dtype=np.int64).reshape(len(parsed), width),
        logprobs=np.array([logprobs[:width] for _, logprobs in parsed], dtype=np.float32).reshape(len(parsed), width),
    )


def _row(row: Mapping[str, Any], actual: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs, the actual token first, then from likely to unlikely."""
    try:
        ids = np.array([int(token) for token in row], dtype=np.int64)
        logprobs = np.array([float(entry["logprob"]) for entry in row.values()])
    except (TypeError, ValueError, KeyError) as error:
        raise BadAnswer("bad_logprobs", f"a row of log-probs cannot be read: {error!r}") from error
    mass = np.exp(logprobs).sum()
    if not (np.isfinite(logprobs).all() and logprobs.max() <= 1e-3 and mass <= 1 + 1e-3):
        raise BadAnswer("bad_logprobs", f"a row of log-probs sums to a probability of {mass:.6g}")
    if not 0 <= actual < vocab_size:
        raise BadAnswer("wrong_ids", f"token {actual} is beyond the vocabulary of {vocab_size}")
    known = (ids >= 0) & (ids < vocab_size)
    ids, logprobs = ids[known], logprobs[known] - np.log1p(-min(np.exp(logprobs[~known]).sum(), 1 - 1e-6))
    order = np.lexsort((ids, -logprobs, ids != actual))
    return ids[order], np.minimum(logprobs[order], 0.0)
