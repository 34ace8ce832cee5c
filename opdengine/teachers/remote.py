"""A teacher whose weights are on another machine and that judges as exactly as a local one.

``opdengine teacher-serve`` sends the final hidden states at the targets; the head is sent once, and the loss is
computed here, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from opd_kernels import LMHead
from opdengine.config.sections import TeacherConfig
from opdengine.data.templates import Reader
from opdengine.errors import ProbeError
from opdengine.models.chat import stop_token_ids, text_of_completion, vocabulary_size
from opdengine.models.rendering import thought_opening
from opdengine.models.surrogates import without_surrogates
from opdengine.teachers import Configured, TeacherError
from opdengine.teachers.about import About, ask_about, pool_of, within
from opdengine.teachers.endpoint import BadAnswer
from opdengine.teachers.exchange import Answer, Expect, Line
from opdengine.teachers.pictures import (
    MOST_CHARACTERS,
    MOST_PIXELS_TOGETHER,
    Encoded,
    asked_with,
    encoded,
    names_of,
    pixels_of,
    processor_fingerprint,
)
from opdengine.teachers.server import ServedTeacher
from opdengine.teachers.wire import DTYPES, GENERATION, tokenizer_fingerprint
from opdengine.types import Completion, Failure, Hidden, Image, Request, SamplingParams, TeacherContext
from opdengine.workers.printing import brief


class RemoteTeacher(Configured):
    """A model behind ``opdengine teacher-serve`` as a frozen teacher.

    Args:
        config: with ``hidden_states_url``.
        tokenizer: of the model, with this teacher's template.
        device: of the head.
        stop_on_failure: raise at the first call that fails for good, instead of returning failures.
        writer: writes its text; None: the servers do.

    Raises:
        ConfigError: the variable that should hold the token is not set.
    """

    def __init__(
        self,
        config: TeacherConfig,
        tokenizer: Any,
        *,
        device: torch.device | str = "cpu",
        stop_on_failure: bool = True,
        writer: ServedTeacher | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.head: LMHead | None = None
        self.opening = thought_opening(tokenizer, config.chat_template_kwargs)
        self.pool = pool_of(config)
        self._reader = Reader(f"teacher {config.name!r}", tokenizer, config.chat_template_kwargs)
        self._device, self._stop, self._writer = device, stop_on_failure, writer
        self._about: About | None = None

    @property
    def about(self) -> About:
        """What its servers said before step 0."""
        if self._about is None:
            raise RuntimeError(f"teacher {self.name!r} has not been probed")
        return self._about

    @property
    def fingerprint(self) -> str:
        return self.about.identity + ("" if self._writer is None else f" {self._writer.fingerprint}")

    @property
    def window(self) -> int | None:
        windows = (self.about.window, None if self._writer is None else self._writer.window)
        return min((w for w in windows if w is not None), default=None)

    async def probe(self, *, judges: bool) -> None:
        """Before step 0: are the servers there, and are they this teacher's? Takes the head, if it ``judges``.

        Raises:
            ProbeError: none answers, or one is another teacher's; says what to change.
        """
        self._about = await ask_about(self.pool, self.config)
        if self._about.tokenizer != tokenizer_fingerprint(self.tokenizer):
            raise ProbeError(
                f"teacher {self.name!r}: {self.pool.endpoints[0].url} has another tokenizer than "
                f"{self.config.tokenizer or self.config.model!r}, so it would read other text than is meant; set the "
                "teacher's 'tokenizer' to the folder of the served model"
            )
        processor = processor_fingerprint(self.tokenizer)
        if processor is not None and processor != self._about.processor:
            blind = self._about.processor is None
            served = "is given no pictures (--images omit)" if blind else "has another processor"
            raise ProbeError(
                f"teacher {self.name!r}: the model at {self.pool.endpoints[0].url} {served}, and here pictures "
                f"are read as {self.config.tokenizer or self.config.model!r} reads them; serve that folder with "
                "--images image, or set the teacher's images to 'text' or 'omit'"
            )
        if judges:
            rows, known = self._about.rows, vocabulary_size(self.tokenizer)
            if not known <= rows <= 2 * known + (1 << 16):
                raise ProbeError(
                    f"teacher {self.name!r}: its head has {rows} rows, but the tokenizer knows {known} ids; model and "
                    "tokenizer do not belong together"
                )
            self.head = await self._fetch_head()
        self.pool.counts.clear()

    async def _fetch_head(self) -> LMHead:
        about = self.about
        (found,) = await self.pool.ask_all("/head", [None], [lambda line: about.head()], stop=False)
        if isinstance(found, Failure):
            raise ProbeError(str(found))
        weight, *bias = (tensor.to(self._device) for tensor in found[1])
        return LMHead(weight, bias[0] if bias else None, about.logit_scale, about.softcap)

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> Sequence[Completion | Failure]:
        """One completion per request, as a local teacher with these weights writes it."""
        if self._writer is not None:
            return await self._writer.generate(requests, params)
        stops = stop_token_ids(self.tokenizer, template_kwargs=self.config.chat_template_kwargs)
        sampling = {**params.as_json(), "seed": params.seed, "stop_token_ids": list(stops)}

        texts = encoded(r.images for r in requests)

        def question(part: Sequence[Request]) -> dict[str, Any]:
            pictures, fields = asked_with([r.images for r in part], texts)
            asked = [
                {"name": _label(r.id), "ids": list(map(int, r.token_ids)), "seed": r.seed, **own}
                for r, own in zip(part, fields, strict=True)
            ]
            return {"requests": asked, "sampling": sampling, **({"pictures": pictures} if pictures else {})}

        lengths = [len(request.token_ids) + params.max_tokens for request in requests]
        sizes = _of_pictures([r.images for r in requests], texts)
        parts = [[requests[i] for i in part] for part in self._parts(lengths, GENERATION, sizes)]
        expects = [_expect_written(len(part), params.max_tokens) for part in parts]
        answers = await self._ask("/generate", [question(part) for part in parts], expects)
        return self._flat(parts, answers, self._read)

    def _read(self, answer: Answer) -> list[Completion | Failure]:
        """The completions of one answer."""
        line, (ids, logprobs) = answer
        ends = np.cumsum(line["lengths"])[:-1]
        pairs = zip(np.split(ids.numpy(), ends), np.split(logprobs.numpy(), ends), strict=True)
        return [
            self._completion(*pair, reason, line["stop_ids"])
            for pair, reason in zip(pairs, line["reasons"], strict=True)
        ]

    def _completion(
        self, ids: np.ndarray, logprobs: np.ndarray, reason: str, ends: Sequence[int]
    ) -> Completion | Failure:
        if ids.min() < 0 or ids.max() >= self.about.rows:
            found = Failure(self.name, "wrong_ids", f"the server wrote token ids beyond its head: {brief(ids, 80)}")
            if self._stop:
                raise TeacherError(str(found))
            return found
        text = text_of_completion(self.tokenizer, ids.tolist(), ends)
        return Completion(ids, logprobs, reason, text)

    async def score(self, contexts: Sequence[TeacherContext]) -> Sequence[Hidden | Failure]:
        """The hidden states that predict the targets of every context, in order."""
        dtype = self.about.dtype
        if self.config.hidden_states_dtype != "auto":
            dtype = DTYPES[self.config.hidden_states_dtype]

        texts = encoded(c.images for c in contexts)

        def question(part: Sequence[TeacherContext]) -> dict[str, Any]:
            pictures, fields = asked_with([c.images for c in part], texts)
            asked = [
                {
                    "name": _label(c.sample_id),
                    "ids": c.token_ids.tolist(),
                    "targets": c.target_positions.tolist(),
                    **own,
                }
                for c, own in zip(part, fields, strict=True)
            ]
            dtype = self.config.hidden_states_dtype
            return {"contexts": asked, "dtype": dtype, **({"pictures": pictures} if pictures else {})}

        def expect(part: Sequence[TeacherContext]) -> Expect:
            return lambda line: [torch.empty(len(c.target_positions), self.about.width, dtype=dtype) for c in part]

        lengths, sizes = [len(c.token_ids) for c in contexts], _of_pictures([c.images for c in contexts], texts)
        parts = [[contexts[i] for i in part] for part in self._parts(lengths, 1, sizes)]
        answers = await self._ask("/score", [question(part) for part in parts], [expect(part) for part in parts])
        return self._flat(parts, answers, lambda answer: [Hidden(states) for states in answer[1]])

    def _parts(self, lengths: Sequence[int], times: int, sizes: Sequence[Shared]) -> Iterator[range]:
        """Consecutive calls of one question each, so that every endpoint has one and none is too large."""
        share = -(-sum(lengths) // len(self.pool.endpoints))
        return parts_of(lengths, min(times * self.about.max_tokens, share), sizes)

    async def _ask(self, path: str, questions: Sequence[Any], expects: Sequence[Expect]) -> list[Answer | Failure]:
        return await self.pool.ask_all(path, questions, expects, self._stop)

    def _flat(
        self,
        parts: Sequence[Sequence[Any]],
        answers: Sequence[Answer | Failure],
        read: Callable[[Answer], Sequence[Any]],
    ) -> list[Any]:
        """One result for every call; a question that failed has failed for all of its calls."""
        results: list[Any] = []
        for part, answer in zip(parts, answers, strict=True):
            if isinstance(answer, Failure):
                self.pool.counts[f"teacher_failures/{self.name}/{answer.reason}"] += len(part)
                results += [answer] * len(part)
            else:
                results += read(answer)
        return results

    def counts(self) -> dict[str, float]:
        """Failures by reason and retries since the last call, as metrics."""
        counts = {name: float(count) for name, count in self.pool.counts.items()}
        self.pool.counts.clear()
        return counts | ({} if self._writer is None else self._writer.counts())


def _label(name: str) -> str:
    """A name for messages, which JSON can carry."""
    return str(without_surrogates(name[:200]))


Shared = tuple[Sequence[Mapping[Hashable, int]], int]
"""Of each index what it needs, by name, and the most that a part may have; what has one name counts once in a part."""


def _of_pictures(sequences: Sequence[Sequence[Image]], texts: Encoded) -> list[Shared]:
    """The characters that the pictures of every sequence have in a question, and their pixels."""
    characters: list[Mapping[Hashable, int]] = [
        {image.sha256: len(texts[image.sha256]) for image in images} for images in sequences
    ]
    pixels: list[Mapping[Hashable, int]] = [{names_of(images): pixels_of(images)} for images in sequences]
    return [(characters, MOST_CHARACTERS), (pixels, MOST_PIXELS_TOGETHER)]


def parts_of(lengths: Sequence[int], most: int, sizes: Sequence[Shared] = ()) -> Iterator[range]:
    """Consecutive indices whose lengths sum to at most ``most``; what is longer stands alone.

    Args:
        lengths: in tokens.
        most: tokens of one part.
        sizes: further bounds of a part.
    """
    first, tokens, held = 0, 0, [dict[Hashable, int]() for _ in sizes]
    for i, length in enumerate(lengths):
        both = [{**before, **needs[i]} for before, (needs, _) in zip(held, sizes, strict=True)]
        full = any(sum(all_.values()) > bound for all_, (_, bound) in zip(both, sizes, strict=True))
        if i > first and (tokens + length > most or full):
            yield range(first, i)
            first, tokens, both = i, 0, [dict(needs[i]) for needs, _ in sizes]
        tokens, held = tokens + length, both
    if lengths:
        yield range(first, len(lengths))


def _expect_written(count: int, most: int) -> Expect:
    """Of the answer with ``count`` completions of at most ``most`` tokens: all ids, then all log-probs."""

    def expect(line: Line) -> list[torch.Tensor]:
        lengths, reasons, ends = (line.get(name) for name in ("lengths", "reasons", "stop_ids"))
        if not (isinstance(lengths, list) and len(lengths) == count and all(within(n, 1, most) for n in lengths)):
            raise BadAnswer(
                "wrong_count", f"lengths {brief(lengths, 60)} of {count} completions of at most {most} tokens"
            )
        if not (
            isinstance(reasons, list) and len(reasons) == count and {"stop", "length"}.issuperset(map(str, reasons))
        ):
            raise BadAnswer("bad_answer", f"ends of completions that are none: {brief(reasons, 60)}")
        if not (isinstance(ends, list) and all(within(i, 0, 1 << 31) for i in ends)):
            raise BadAnswer("bad_answer", f"stop_ids are no token ids: {brief(ends, 60)}")
        return [torch.empty(sum(lengths), dtype=torch.int64), torch.empty(sum(lengths))]

    return expect
