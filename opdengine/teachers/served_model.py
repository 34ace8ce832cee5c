"""What ``opdengine teacher-serve`` answers: a model's hidden states at targets, its head, and what it writes.

It computes what a local teacher computes, with the same code.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opdengine.models.backbone import Backbone, load_model, read_dtype
from opdengine.models.chat import load_tokenizer, stop_token_ids
from opdengine.models.fingerprint import contents
from opdengine.models.lora import digest
from opdengine.rollout.transformers import TransformersSampler, check_room
from opdengine.teachers.local import model_fingerprint
from opdengine.teachers.prefix import PrefixScorer
from opdengine.teachers.wire import (
    DTYPES,
    GENERATION,
    PROTOCOL,
    name_of,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from opdengine.types import Request, SamplingParams
from opdengine.workers.printing import one_line

NO_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""Trainers render the chats, so that models without a template can be served."""

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Label = Annotated[str, Field(max_length=200)]


class RefusedError(Exception):
    """A question that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Context(_Asked):
    name: Label
    ids: Annotated[list[TokenId], Field(min_length=1)]
    targets: list[TokenId]


class _Scoring(_Asked):
    contexts: Annotated[list[_Context], Field(min_length=1, max_length=100_000)]
    dtype: Literal["auto", "float32", "bfloat16"]


class _Prompt(_Asked):
    name: Label
    ids: Annotated[list[TokenId], Field(min_length=1)]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class _Sampling(_Asked):
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    temperature: Annotated[float, Field(ge=0, le=1e6)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)]
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)]
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=10_000)]], Field(max_length=100)]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1000)]


class _Writing(_Asked):
    requests: Annotated[list[_Prompt], Field(min_length=1, max_length=100_000)]
    sampling: _Sampling


Reply = tuple[Mapping[str, Any], Sequence[torch.Tensor]]


class Served:
    """A loaded model and its answers.

    Args:
        model: folder or hub name.
        dtype: of its weights; "auto" keeps the checkpoint's.
        device: where it computes.
        attn_implementation: see :func:`opdengine.models.backbone.load_model`.
        trust_remote_code: run code that comes with the model.
        max_tokens: token budget of one pass, and of one question.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        attn_implementation: str = "auto",
        trust_remote_code: bool = False,
        max_tokens: int = 16384,
    ) -> None:
        folder = Path(model).expanduser()
        self.name = folder.absolute().name if folder.is_dir() else model
        self.max_tokens = max_tokens
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, chat_template=NO_TEMPLATE, sees=False)
        files = contents(model, trust_remote_code)
        loaded = load_model(
            model,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device=device,
        )
        loaded.requires_grad_(False).eval()
        self.backbone = Backbone(loaded, name=f"the teacher {self.name!r}", max_tokens=max_tokens)
        self._scorer = PrefixScorer(self.backbone)
        self._sampler = TransformersSampler(loaded, tokenizer, GENERATION * max_tokens)
        self._sampler.prove()
        self._ends = stop_token_ids(None, loaded)
        self._identity = model_fingerprint(model, loaded)
        self._tokenizer = tokenizer_fingerprint(tokenizer)
        self.contents = files if files is not None else {"weights": digest(loaded.named_parameters())}
        if loaded.dtype != (read_dtype(model, trust_remote_code=trust_remote_code) or loaded.dtype):
            self.contents |= {"dtype": name_of(loaded.dtype)}  # a run that is resumed shall not get another one
        self.fingerprint = weights_fingerprint(self.contents, self.head.weight.dtype)
        self._model = threading.Lock()

    @property
    def head(self) -> Any:
        """Its frozen output head."""
        return self.backbone.head

    def about(self) -> Reply:
        """What a trainer compares before step 0."""
        head = self.head
        return {
            "protocol": PROTOCOL,
            "identity": self._identity,
            "model": self.name,
            "contents": self.contents,
            "dtype": name_of(head.weight.dtype),
            "width": head.weight.shape[1],
            "rows": head.weight.shape[0],
            "bias": None if head.bias is None else name_of(head.bias.dtype),
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
            "window": self.backbone.window,
            "max_tokens": self.max_tokens,
            "tokenizer": self._tokenizer,
        }, ()

    def send_head(self) -> Reply:
        """Weight, and bias where there is one."""
        head = self.head
        return {}, [head.weight] if head.bias is None else [head.weight, head.bias]

    def score(self, body: bytes, waits: Callable[[], bool]) -> Reply:
        """The hidden states at the targets of every context.

        Args:
            body: of the question.
            waits: whether whoever asked is still there.

        Raises:
            RefusedError: it cannot be answered.
        """
        asked = _read(_Scoring, body)
        for context in asked.contexts:
            self._check_ids(f"context {context.name!r}", context.ids)
            places = context.targets
            ascend = all(a < b for a, b in pairwise([0, *places, len(context.ids)]))
            if not ascend:
                raise RefusedError(
                    422, f"context {context.name!r}: targets do not ascend within 1 to {len(context.ids) - 1}"
                )
        self._check_size([len(c.ids) for c in asked.contexts], self.max_tokens)
        ids = [np.array(c.ids, dtype=np.int64) for c in asked.contexts]
        targets = [np.array(c.targets, dtype=np.int64) for c in asked.contexts]
        with self._turn(waits):
            states = self._scorer.score(ids, targets)
        dtype = self.head.weight.dtype if asked.dtype == "auto" else DTYPES[asked.dtype]
        return {}, [rows.to(dtype) for rows in states]

    def write(self, body: bytes, waits: Callable[[], bool]) -> Reply:
        """One completion for every prompt: lengths and ends; all token ids, all log-probs.

        Args:
            body: of the question.
            waits: whether whoever asked is still there.

        Raises:
            RefusedError: it cannot be answered.
        """
        asked = _read(_Writing, body)
        sampling = asked.sampling.model_dump()
        sampler = copy.copy(self._sampler)  # what was proved of the model goes along
        sampler.stop_ids = tuple(sorted({*self._ends, *sampling.pop("stop_token_ids")}))
        params = SamplingParams(**{**sampling, "stop": tuple(sampling["stop"])})
        requests = [Request(r.name, tuple(r.ids), r.seed) for r in asked.requests]
        for request in requests:
            self._check_ids(f"prompt {request.id!r}", request.token_ids)
            try:
                check_room(request, params.max_tokens, sampler.window)
            except ValueError as error:
                raise RefusedError(422, str(error)) from None
        self._check_size([len(r.token_ids) + params.max_tokens for r in requests], GENERATION * self.max_tokens)
        with self._turn(waits):
            written = [completions[0] for completions in sampler.generate(requests, params)]
        line = {
            "lengths": [len(c.token_ids) for c in written],
            "reasons": [c.stop_reason for c in written],
            "stop_ids": list(sampler.stop_ids),
        }
        ids, logprobs = (np.concatenate([getattr(c, name) for c in written]) for name in ("token_ids", "logprobs"))
        return line, [torch.from_numpy(ids), torch.from_numpy(logprobs)]

    def _check_ids(self, which: str, ids: Sequence[int]) -> None:
        window, known = self.backbone.window, self.backbone.trunk.get_input_embeddings().weight.shape[0]
        if window is not None and len(ids) > window:
            raise RefusedError(
                422, f"{which} has {len(ids)} tokens, and the window of {self.name!r} has {window}; shorten it"
            )
        if max(ids) >= known:
            raise RefusedError(422, f"{which} has the token id {max(ids)}, and {self.name!r} knows {known}")

    @staticmethod
    def _check_size(lengths: Sequence[int], most: int) -> None:
        if len(lengths) > 1 and sum(lengths) > most:
            raise RefusedError(413, f"{sum(lengths)} tokens in one question, which may have {most}; ask in parts")

    @contextmanager
    def _turn(self, waits: Callable[[], bool]) -> Iterator[None]:
        """The model to oneself, unless whoever asked has gone meanwhile."""
        with self._model:
            if not waits():
                raise ConnectionAbortedError("nobody waits for the answer")
            yield


def _read(kind: Any, body: bytes) -> Any:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RefusedError(400, f"a question that is none: {one_line(place, 100)}: {first['msg']}") from None
