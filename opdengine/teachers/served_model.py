"""What ``opdengine teacher-serve`` answers: a model's hidden states at targets, its head, and what it writes.

It computes what a local teacher computes, with the same code.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from opdengine.models.backbone import Backbone, load_model, read_dtype
from opdengine.models.chat import load_tokenizer, stop_token_ids
from opdengine.models.fingerprint import contents
from opdengine.models.lora import digest
from opdengine.models.pictures import PictureError
from opdengine.rollout.transformers import TransformersSampler, check_room
from opdengine.teachers.local import model_fingerprint
from opdengine.teachers.pictures import (
    MOST_PIXELS_TOGETHER,
    names_of,
    pixels_of,
    processor_fingerprint,
    received,
)
from opdengine.teachers.prefix import PrefixScorer
from opdengine.teachers.questions import Context, Prompt, Question, Scoring, Writing
from opdengine.teachers.wire import (
    DTYPES,
    GENERATION,
    PROTOCOL,
    name_of,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from opdengine.types import Image, Request, SamplingParams
from opdengine.workers.printing import one_line

NO_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""Trainers render the chats, so that models without a template can be served."""

PICTURES = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ MARK }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)
"""The same of a model that sees, with what stands for a picture in place of MARK: how it reads some is tried here."""


class RefusedError(Exception):
    """A question that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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
        images: "image": a model that sees is loaded with its tower, and is given the pictures of questions; "omit": it
            is given none, and its language model alone is loaded.

    Raises:
        ConfigError: its processor cannot be loaded.
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
        images: str = "image",
    ) -> None:
        folder = Path(model).expanduser()
        self.name = folder.absolute().name if folder.is_dir() else model
        self.max_tokens = max_tokens
        tokenizer = load_tokenizer(
            model, trust_remote_code=trust_remote_code, chat_template=NO_TEMPLATE, sees=images == "image"
        )
        self.vision = tokenizer.vision
        if self.vision is not None:
            tokenizer.chat_template = PICTURES.replace("MARK", json.dumps(self.vision.marker))
        files = contents(model, trust_remote_code)
        loaded = load_model(
            model,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device=device,
            sees=self.vision is not None,
        )
        loaded.requires_grad_(False).eval()
        self.backbone = Backbone(loaded, name=f"the teacher {self.name!r}", max_tokens=max_tokens, vision=self.vision)
        self._scorer = PrefixScorer(self.backbone)
        self._sampler = TransformersSampler(loaded, tokenizer, GENERATION * max_tokens)
        self._sampler.prove()
        self._ends = stop_token_ids(None, loaded)
        self._identity = model_fingerprint(model, loaded)
        self._tokenizer = tokenizer_fingerprint(tokenizer)
        self.contents = files if files is not None else {"weights": digest(loaded.named_parameters())}
        if loaded.dtype != (read_dtype(model, trust_remote_code=trust_remote_code) or loaded.dtype):
            self.contents |= {"dtype": name_of(loaded.dtype)}  # a run that is resumed shall not get another one
        self._processor = processor_fingerprint(tokenizer)
        if self._processor is not None:
            self.contents |= {"processor": self._processor}
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
            "processor": self._processor,
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
        asked = _read(Scoring, body)
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
        names = [f"context {c.name!r}" for c in asked.contexts]
        images = self._pictures(asked, zip(names, asked.contexts, strict=True))
        with self._turn(waits):
            for name, row, own in zip(names, ids, images, strict=True):
                self._check_pictures(name, row, own)
            states = self._scorer.score(ids, targets, images)
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
        asked = _read(Writing, body)
        sampling = asked.sampling.model_dump()
        sampler = copy.copy(self._sampler)  # what was proved of the model goes along
        sampler.stop_ids = tuple(sorted({*self._ends, *sampling.pop("stop_token_ids")}))
        params = SamplingParams(**{**sampling, "stop": tuple(sampling["stop"])})
        images = self._pictures(asked, ((f"prompt {r.name!r}", r) for r in asked.requests))
        requests = [
            Request(r.name, tuple(r.ids), r.seed, images=own) for r, own in zip(asked.requests, images, strict=True)
        ]
        for request in requests:
            self._check_ids(f"prompt {request.id!r}", request.token_ids)
            try:
                check_room(request, params.max_tokens, sampler.window)
            except ValueError as error:
                raise RefusedError(422, str(error)) from None
        self._check_size([len(r.token_ids) + params.max_tokens for r in requests], GENERATION * self.max_tokens)
        with self._turn(waits):
            for request in requests:
                self._check_pictures(f"prompt {request.id!r}", np.array(request.token_ids), request.images)
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

    def _pictures(self, asked: Question, sequences: Iterable[tuple[str, Context | Prompt]]) -> list[tuple[Image, ...]]:
        """The pictures of every sequence of a question, decoded once."""
        if asked.pictures and self.vision is None:
            raise RefusedError(
                422, f"{self.name!r} is given no pictures here: set the teacher's images to 'text' or 'omit', or serve "
                "a model that sees with --images image"
            )  # fmt: skip
        shown = list(sequences)
        for name, sequence in shown:
            if max(sequence.pictures, default=-1) >= len(asked.pictures):
                raise RefusedError(422, f"{name} has a picture that is not in the question")
        if left := len(set(range(len(asked.pictures))).difference(*(sequence.pictures for _, sequence in shown))):
            raise RefusedError(422, f"no sequence has {left} of the pictures of the question")
        try:
            known = received(asked.pictures)
        except PictureError as error:
            raise RefusedError(422, str(error)) from None
        found = [tuple(known[place] for place in sequence.pictures) for _, sequence in shown]
        pixels = sum({names_of(own): pixels_of(own) for own in found}.values())
        if pixels > MOST_PIXELS_TOGETHER:
            raise RefusedError(
                413, f"{pixels} pixels of pictures in one question, which may have {MOST_PIXELS_TOGETHER}; make them "
                "smaller, or ask in parts"
            )  # fmt: skip
        return found

    def _check_pictures(self, name: str, ids: np.ndarray, images: tuple[Image, ...]) -> None:
        """Refuse pictures that the processor cannot read, or of which it makes more or fewer tokens."""
        try:
            fits = not images or self.vision.matches(ids, images)
        except ValueError as error:
            raise RefusedError(422, f"{name}: {error}") from None
        if not fits:
            raise RefusedError(422, f"{name} has other image tokens than the pictures have features")

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
