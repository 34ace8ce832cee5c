"""Batched generation with the model's own forward pass: exact ids, exact log-probs, any device.

One prefill per prompt (samples of a prompt share it), one forward pass per token, finished
sequences leave the batch; models whose cache cannot do that are sampled one sequence at a time
(:mod:`opdengine.rollout.decoding`). Every sequence has its own random stream, so what is sampled does
not depend on what else is in the batch.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from opdengine.models.batching import (
    EXACT,
    find_regimes,
    forward_options,
    probe_sequences,
    relative,
    tolerance,
    window_of,
)
from opdengine.models.chat import stop_token_ids, text_of_completion, vocabulary_size
from opdengine.models.lora import LowRank
from opdengine.models.packing import Regimes
from opdengine.models.quantised import is_quantised
from opdengine.models.vision import Vision
from opdengine.rollout.chats import Chats, Read
from opdengine.rollout.decoding import Decoding, Together, Ways, choose_decoding
from opdengine.types import Completion, Encoded, Request, SamplingParams

logger = logging.getLogger(__name__)


class TransformersSampler:
    """Samples from a loaded Hugging Face model, in the trainer's process.

    The sampler reads the live parameters of ``model``: when that is the trainer's own model, its
    weights are the trainer's by construction and :meth:`load_policy` only stamps the version.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer (for stop strings and text).
        max_batch_tokens: bound on sequences * (prompt + new tokens) held at a time.
        bf16: passes run under autocast to bfloat16, as the trainer's do.
        template_kwargs: of the chat template, which may print another end of a turn with them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_batch_tokens: int = 32768,
        bf16: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.bf16 = bf16
        self.tokenizer = tokenizer
        self.vision: Vision | None = getattr(tokenizer, "vision", None)
        self.max_batch_tokens = max_batch_tokens
        self.policy_version = 0
        self.stop_ids = stop_token_ids(tokenizer, model, template_kwargs)
        self.vocabulary = vocabulary_size(tokenizer)
        self._chats: Chats | None = None
        self.window = window_of(model.config)

    @property
    def device(self) -> torch.device:
        place: torch.device = self.model.get_input_embeddings().weight.device
        return place

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """See :class:`opdengine.rollout.Sampler`."""
        for request in requests:
            check_room(request, params.max_tokens, self.window)
        self.prove()
        results: list[list[Completion]] = [[] for _ in requests]
        past: list[Read | None] = [None] * len(requests)
        if self._chats is not None:
            # Two pictures may have the same tokens: such chats are read anew.
            past = self._chats.take([() if request.images else request.token_ids for request in requests])
        with self._evaluating():
            for group in self._groups(requests, params, past):
                reads = [read for i in group if (read := past[i]) is not None]  # all of a group, or none
                completions = self._generate_batch([requests[i] for i in group], params, reads)
                for place, i in enumerate(group):
                    results[i] = completions[place * params.n : (place + 1) * params.n]
        return results

    @contextmanager
    def chats(self) -> Iterator[None]:
        """See :class:`opdengine.rollout.Sampler`; at most ``max_batch_tokens`` tokens are kept between turns."""
        if self._keeps_chats:
            self._chats = Chats(self.max_batch_tokens)
        try:
            yield
        finally:
            self._chats = None

    @cached_property
    def _keeps_chats(self) -> bool:
        """Whether a chat can go on from what was read of it; where it cannot, that is said once."""
        regimes, ways = self._proven
        keeps = ways.resumes and regimes.switch is None
        if not keeps:
            logger.warning(
                "%s: its cache cannot be kept from one turn of an episode to the next: every turn reads the whole chat "
                "again, which is slow (use_vllm samples the student elsewhere)",
                type(self.model).__name__,
            )
        return keeps

    def prove(self) -> None:
        """Find the way to sample that gives the model's own log-probs; the first call costs a few passes."""
        _ = self._proven, self._seen

    @cached_property
    def _proven(self) -> tuple[Regimes, Ways]:
        with self._evaluating():
            regimes = find_regimes(self.model, self._states)
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            sequences = probe_sequences(self.model.config, vocabulary, regimes.switch)
            ids = [sequences[1].tolist(), sequences[-1].tolist()]
            return regimes, choose_decoding(self.model, ids, self._limit(ids[-1]))

    @cached_property
    def _seen(self) -> Ways:
        """How chats with pictures are sampled."""
        if self.vision is None:
            return Ways()
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = probe_sequences(self.model.config, vocabulary)[1].tolist()
        probes = self.vision.probe(ids)[:2]
        with self._evaluating():
            return choose_decoding(self.model, probes, self._limit(ids), vision=self.vision)

    def _limit(self, ids: Sequence[int]) -> float:
        """Relative difference of logits that is rounding, found by reading a third of some tokens alone."""
        if self.model.dtype == torch.float32 and not self.bf16:
            return EXACT
        lengths = (len(ids), len(ids) // 3)
        whole, part = (self._states(torch.tensor([ids[:n]]), torch.arange(n)[None])[0] for n in lengths)
        return tolerance(relative(part, whole[: len(part)]))

    def _states(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": ids.to(self.device), "position_ids": positions.to(self.device), "use_cache": False}
        logits: torch.Tensor = self.model(**inputs, **forward_options(self.model)).logits
        return logits

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                yield
        finally:
            self.model.train(training)

    def load_policy(
        self, version: int, weights: Iterable[tuple[str, torch.Tensor]], low_rank: LowRank | None = None
    ) -> None:
        """Stamp the version; copy the weights unless they are the model's own (with its adapter inside)."""
        if is_quantised(self.model):  # always the trainer's own; its state is made anew whenever it is asked for
            self.policy_version = version
            return
        own = self.model.state_dict()
        places = {tensor.data_ptr() for tensor in own.values()}
        with torch.no_grad():
            for name, value in weights:
                if value.data_ptr() in places:
                    continue
                if low_rank is not None and name in low_rank:
                    left, right = low_rank[name]
                    value = value.float() + left @ right
                own[name].copy_(value)
        self.policy_version = version

    def sleep(self) -> None:
        """The model is the trainer's own: there is nothing to give back."""

    def close(self) -> None:
        """Nothing is held beyond the model itself."""

    def _groups(
        self, requests: Sequence[Request], params: SamplingParams, past: Sequence[Read | None]
    ) -> list[list[int]]:
        """Requests of similar length and one regime together, each batch within the token budget."""
        groups: list[list[int]] = []
        longest, last, regimes = 0, (0, 0, False, False), self._proven[0]
        kinds = [(bool(request.images), read is None) for request, read in zip(requests, past, strict=True)]
        for i in sorted(range(len(requests)), key=lambda i: (kinds[i], len(requests[i].token_ids), i)):
            length = len(requests[i].token_ids)
            longest = length + params.max_tokens
            span = regimes.of(length), regimes.of(longest), *kinds[i]
            size = (len(groups[-1]) + 1) * params.n if groups else 0
            if not groups or span != last or size * longest > self.max_batch_tokens:
                groups.append([])
            groups[-1].append(i)
            last = span
        return groups

    def _generate_batch(
        self, requests: Sequence[Request], params: SamplingParams, past: Sequence[Read]
    ) -> list[Completion]:
        state = _State(requests, params, self.device, self.vocabulary)
        prompts = [Encoded(request.token_ids, request.images) for request in requests]
        regimes, ways = self._proven
        if requests[0].images:
            ways = self._seen
        longest = max(map(len, prompts)) + params.max_tokens
        decoding: Decoding = ways.start(self.model, prompts, params.n, longest, regimes, self.vision, past)
        while True:
            tokens = self._sample(decoding.logits[:, : self.vocabulary], state, params)
            self._finish(tokens, state, params)
            if self._chats is not None and params.n == 1 and not requests[0].images and isinstance(decoding, Together):
                keep_ended(self._chats, decoding, prompts, state)
            kept = state.compact()
            if not len(state.live):
                break
            if kept is not None:
                decoding.keep(kept)
            decoding.advance(state.last)
        return [
            Completion(
                token_ids=np.array(ids, dtype=np.int64),
                logprobs=np.array(logprobs, dtype=np.float32),
                stop_reason=reason,
                text=text_of_completion(self.tokenizer, ids, self.stop_ids),
            )
            for ids, logprobs, reason in zip(state.ids, state.logprobs, state.reasons, strict=True)
        ]

    def _sample(self, logits: torch.Tensor, state: _State, params: SamplingParams) -> list[int]:
        """Draw one token per live row and note its log-prob under what was sampled from."""
        logits = logits.float()
        if params.repetition_penalty != 1.0:
            logits = penalise(logits, state.seen, params.repetition_penalty)
        if params.temperature == 0:
            logprobs = logits.log_softmax(-1)
            tokens = logprobs.argmax(-1)
        else:
            logits = truncate(logits / params.temperature, params)
            logprobs = logits.log_softmax(-1)
            # On a GPU the order of the sum over a single row varies: in float64 it does not matter.
            cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64 if logprobs.is_cuda else None)
            uniform = torch.from_numpy(state.uniforms()).to(cumulative)[:, None]
            tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
            # Rounding at the upper edge must not choose a token of probability zero.
            last = (logprobs > -torch.inf).float().cumsum(-1).argmax(-1, keepdim=True)
            tokens = torch.minimum(tokens, last)[:, 0]
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        # Both are exact in float64; a GPU is waited for once.
        drawn, noted = torch.stack([tokens.double(), chosen.double()]).tolist()
        ids = [int(token) for token in drawn]
        state.append(tokens, ids, noted)
        return ids

    def _finish(self, tokens: list[int], state: _State, params: SamplingParams) -> None:
        for row, token in zip(state.live, tokens, strict=True):
            ids = state.ids[row]
            if token in self.stop_ids or self._hits_stop_string(ids, params.stop):
                state.reasons[row] = "stop"
            elif len(ids) >= params.max_tokens:
                state.reasons[row] = "length"

    def _hits_stop_string(self, ids: list[int], stop: tuple[str, ...]) -> bool:
        if not stop:
            return False
        # Every token adds at least one byte, so the match lies within the last tokens.
        last = ids[-(max(len(s.encode()) for s in stop) + 4) :]
        tail = self.tokenizer.decode(last, clean_up_tokenization_spaces=False)
        return any(s in tail for s in stop)


class _State:
    """The sequences of one batch: all of them on the host, the live ones on the device."""

    def __init__(
        self, requests: Sequence[Request], params: SamplingParams, device: torch.device, vocabulary: int
    ) -> None:
        count = len(requests) * params.n
        self.seen: torch.Tensor | None = None
        if params.repetition_penalty != 1.0:
            # One column more takes ids beyond the tokenizer.
            seen = torch.zeros(len(requests), vocabulary + 1, dtype=torch.bool)
            for row, request in enumerate(requests):
                seen[row, torch.tensor(request.token_ids).clamp(max=vocabulary)] = True
            self.seen = seen.to(device).repeat_interleave(params.n, dim=0)
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.reasons = [""] * count
        self.live = list(range(count))
        self.last = torch.zeros(count, dtype=torch.int64, device=device)
        self._streams = [
            np.random.Generator(np.random.Philox(key=stream_key(params.seed, r.seed, i)))
            for r in requests
            for i in range(params.n)
        ]

    def uniforms(self) -> np.ndarray:
        """One number in [0, 1) for each live row, from the row's own stream."""
        return np.array([self._streams[row].random() for row in self.live])

    def append(self, tokens: torch.Tensor, ids: list[int], logprobs: list[float]) -> None:
        """Note the next token of every live row, on the device and on the host."""
        self.last = tokens
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        for row, token, logprob in zip(self.live, ids, logprobs, strict=True):
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)

    def compact(self) -> torch.Tensor | None:
        """Drop finished rows; returns the indices kept, or None when all live rows stay."""
        places = [place for place, row in enumerate(self.live) if not self.reasons[row]]
        if len(places) == len(self.live):
            return None
        self.live = [self.live[place] for place in places]
        kept = torch.tensor(places, dtype=torch.long, device=self.last.device)
        self.last = self.last[kept]
        if self.seen is not None:
            self.seen = self.seen[kept]
        return kept


def keep_ended(chats: Chats, decoding: Together, prompts: Sequence[Sequence[int]], state: _State) -> None:
    """Keep what was read of the chats whose turn has just ended: all but the last token, which nothing follows yet."""
    for place, row in enumerate(state.live):
        if state.reasons[row]:
            ids = [*prompts[row], *state.ids[row][:-1]]
            if chats.has_room(len(ids)):
                chats.put(decoding.read(place, ids))


def check_room(request: Request, max_tokens: int, window: int | None) -> None:
    """Raise ValueError unless the prompt is not empty and leaves room for ``max_tokens``."""
    if not request.token_ids:
        raise ValueError(f"prompt {request.id!r} has no tokens")
    length = len(request.token_ids)
    if window is not None and length + max_tokens > window:
        raise ValueError(
            f"prompt {request.id!r} has {length} tokens and may be continued by {max_tokens}, which "
            f"exceeds the model's window of {window}; lower the completion length or drop the "
            "prompt (max_prompt_length)"
        )


def stream_key(seed: int, request_seed: int, sample: int) -> int:
    """A well-spread 64-bit key from (seed, request seed, sample index)."""
    text = f"{seed}:{request_seed}:{sample}".encode()
    return (zlib.crc32(text) << 32) | zlib.crc32(text[::-1] + b"#")


def penalise(logits: torch.Tensor, seen: torch.Tensor | None, penalty: float) -> torch.Tensor:
    """Repetition penalty of CTRL (arXiv 1909.05858), over prompt and completion (seen: [B, V + 1])."""
    assert seen is not None
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen[:, : logits.shape[1]], penalised, logits)


def truncate(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Top-k, then nucleus: tokens outside get -inf."""
    if 0 < params.top_k < logits.shape[-1]:
        threshold = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if params.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        outside = mass.cumsum(-1) - mass >= params.top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, index, outside), -torch.inf)
    return logits
