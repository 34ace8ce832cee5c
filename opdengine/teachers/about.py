"""What the servers of an exact teacher say of themselves before step 0."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdengine.config.sections import TeacherConfig
from opdengine.errors import ProbeError
from opdengine.teachers.endpoint import BadAnswer
from opdengine.teachers.exchange import AttemptFailed, Line
from opdengine.teachers.pool import PROBE_SECONDS, Endpoint, Pool
from opdengine.teachers.server import api_key
from opdengine.teachers.wire import DTYPES, PROTOCOL
from opdengine.workers.printing import brief

logger = logging.getLogger(__name__)

MOST_WIDTH, MOST_TOKENS = 1 << 20, 1 << 40


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


CHECKS: dict[str, Callable[[Any], bool]] = {
    "fingerprint": lambda v: isinstance(v, str),
    "identity": lambda v: isinstance(v, str) and len(v) <= 200,
    "model": lambda v: isinstance(v, str),
    "contents": lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
    "dtype": lambda v: v in DTYPES,
    "width": lambda v: within(v, 1, MOST_WIDTH),
    "rows": lambda v: within(v, 1, MOST_WIDTH << 4),
    "bias": lambda v: v is None or v in DTYPES,
    "logit_scale": _is_factor,
    "softcap": lambda v: v is None or _is_factor(v),
    "window": lambda v: v is None or within(v, 2, MOST_TOKENS),
    "max_tokens": lambda v: within(v, 2, MOST_TOKENS),
    "tokenizer": lambda v: isinstance(v, str),
    "processor": lambda v: v is None or isinstance(v, str),
}
"""What each field of :class:`About` may be."""


@dataclass(frozen=True)
class About:
    """What a server says of its model.

    Args:
        fingerprint: of its weights, and of the dtype in which they compute.
        identity: of its weights in caches, the same as of this teacher here.
        model: its name.
        contents: its files by hash, and the dtype where it is not theirs.
        dtype: in which it computes.
        width: of its hidden states.
        rows: of its head.
        bias: dtype of the head's bias; None where it has none.
        logit_scale, softcap: of the head.
        window: longest sequence in tokens; None is unbounded.
        max_tokens: most tokens of one question, unless that has one context alone.
        tokenizer: its fingerprint.
        processor: the fingerprint of what reads pictures; None: it is given none.
    """

    fingerprint: str
    identity: str
    model: str
    contents: Mapping[str, str]
    dtype: torch.dtype
    width: int
    rows: int
    bias: torch.dtype | None
    logit_scale: float
    softcap: float | None
    window: int | None
    max_tokens: int
    tokenizer: str
    processor: str | None

    @classmethod
    def of(cls, line: Line) -> About:
        """Read what a server says.

        Raises:
            BadAnswer: it says something else.
        """
        if line.get("protocol") != PROTOCOL:
            raise BadAnswer(
                "bad_answer", f"it speaks version {brief(line.get('protocol'), 20)} of the protocol, and this side "
                f"{PROTOCOL}; run the same opdengine on both"
            )  # fmt: skip
        for name, check in CHECKS.items():
            try:
                ok = check(line.get(name))
            except TypeError:  # what cannot be looked up in a table
                ok = False
            if not ok or name not in line:
                raise BadAnswer("bad_answer", f"it says {name}={brief(line.get(name), 40)}, which is not possible")
        told = {name: line[name] for name in CHECKS}
        bias = None if told["bias"] is None else DTYPES[told["bias"]]
        return cls(**{**told, "dtype": DTYPES[told["dtype"]], "bias": bias})

    def head(self) -> list[torch.Tensor]:
        """Empty tensors for weight and bias."""
        weight = torch.empty(self.rows, self.width, dtype=self.dtype)
        return [weight] if self.bias is None else [weight, torch.empty(self.rows, dtype=self.bias)]


def within(value: Any, low: int, high: int) -> bool:
    """Whether a value that was read is a whole number between two bounds."""
    return type(value) is int and low <= value <= high


def pool_of(config: TeacherConfig) -> Pool:
    """The endpoints of a teacher with ``hidden_states_url``.

    Raises:
        ConfigError: the variable that should hold the token is not set.
    """
    return Pool(
        config.name,
        config.hidden_states_url,
        key=api_key(config),
        timeout=config.timeout,
        max_retries=config.max_retries,
        max_concurrency=config.max_concurrency,
    )


async def ask_about(pool: Pool, config: TeacherConfig) -> About:
    """What the endpoints of a teacher are; from now on each must answer with these weights.

    Those that do not answer are said, and count as lost until they do.

    Raises:
        ProbeError: none answers, or one is another model's.
    """
    said = await asyncio.gather(*(_about_of(pool, endpoint) for endpoint in pool.endpoints))
    if not (there := [(e, about) for e, about in zip(pool.endpoints, said, strict=True) if about is not None]):
        raise ProbeError(
            f"teacher {config.name!r}: no endpoint answers as it should; start one with "
            "'opdengine teacher-serve --model ...': "
            + "; ".join(f"{e.url} ({e.lost and e.lost.reason}: {e.lost})" for e in pool.endpoints)
        )
    for endpoint in pool.endpoints:
        if endpoint.lost is not None:
            logger.warning(
                "teacher %r goes on without %s (%s: %s)",
                config.name, endpoint.url, endpoint.lost.reason, endpoint.lost,
            )  # fmt: skip
    (first, about), *others = there
    for endpoint, other in there:
        if Path(other.model).name != Path(config.model).name:
            raise ProbeError(
                f"teacher {config.name!r}: {endpoint.url} does not serve {Path(config.model).name!r} but "
                f"{brief(Path(other.model).name, 100)}; set the teacher's 'model' to it, or serve the other one"
            )
    for endpoint, other in others:
        if other != about:
            names = [n for n in About.__dataclass_fields__ if getattr(other, n) != getattr(about, n)]
            raise ProbeError(
                f"teacher {config.name!r}: {first.url} and {endpoint.url} do not serve the same (what differs: "
                f"{', '.join(names)}); start both with the same model and options"
            )
    pool.fingerprint = about.fingerprint
    return about


async def _about_of(pool: Pool, endpoint: Endpoint) -> About | None:
    """What one endpoint says; None, with the reason noted, where it does not answer.

    Raises:
        ProbeError: it refuses, or is no such server.
    """
    for attempt in range(pool.max_retries + 1):
        if attempt:
            await asyncio.sleep(min(pool.backoff * 2 ** (attempt - 1), pool.longest_wait))
        try:
            line, _ = await pool.ask(endpoint, "/about", None, lambda line: (), PROBE_SECONDS)
            endpoint.lost = None
            return About.of(line)
        except AttemptFailed as error:
            endpoint.lost, refused = error, not error.may_pass
        except BadAnswer as error:
            endpoint.lost, refused = AttemptFailed(error.reason, str(error)), True
        if refused:
            hint = "; api_key_env names the variable that holds its token" if endpoint.lost.reason == "http_401" else ""
            raise ProbeError(
                f"teacher {pool.name!r}: {endpoint.url} cannot be used as a server of 'opdengine teacher-serve' "
                f"({endpoint.lost.reason}: {endpoint.lost}){hint}"
            )
    return None
