"""One token after the other with a model's own cache: all sequences together, or each by itself.

Left padding, copies of a prompt and rows that leave are handled by the cache. Not every architecture's cache can
do that, and some cannot even continue a single sequence exactly: :func:`choose_decoding` finds out what gives the
log-probs of a whole pass, with forced tokens, before anything is sampled.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from opdengine.models.batching import UNPROBED, cache_argument, forget_lengths, forward_options, relative
from opdengine.models.packing import ONE_REGIME, Packed, Regimes
from opdengine.models.vision import Vision
from opdengine.rollout.chats import Read, cache_of, read_of
from opdengine.types import Encoded, images_in

logger = logging.getLogger(__name__)

Ids = Sequence[int]
"""Token ids of one sequence; :class:`opdengine.types.Encoded` ones bring their pictures."""


class Decoding(Protocol):
    """Sequences that grow by one token at a time; ``logits`` [rows, V] predict the next one of each."""

    logits: torch.Tensor

    def advance(self, tokens: torch.Tensor) -> None:
        """Append one token to every row (int64 [rows])."""
        ...

    def keep(self, places: torch.Tensor) -> None:
        """Only these rows go on (int64, in any order)."""
        ...


class Together:
    """One cache for all rows: prompts padded on the left, one pass over each for all its copies.

    Args:
        model: a causal LM.
        prompts: of the rows; all of them have pictures, or none has.
        copies: of each prompt.
        vision: reads the pictures.
        past: what was read of the prompts' beginnings; () reads them whole.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Ids],
        copies: int = 1,
        vision: Vision | None = None,
        past: Sequence[Read] = (),
    ) -> None:
        self.model = model
        self.options = forward_options(model)
        self.argument = cache_argument(model)
        device = model.get_input_embeddings().weight.device
        begun = [len(read.ids) for read in past] or [0] * len(prompts)
        width = max(begun)
        lengths = [len(prompt) - known for prompt, known in zip(prompts, begun, strict=True)]
        ids = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
        mask = np.zeros((len(prompts), width + max(lengths)), dtype=np.int64)
        for row, (prompt, known, length) in enumerate(zip(prompts, begun, lengths, strict=True)):
            ids[row, ids.shape[1] - length :] = prompt[known:]
            mask[row, mask.shape[1] - length :] = mask[row, width - known : width] = 1
        self.mask = torch.from_numpy(mask).to(device)
        inputs: dict[str, Any] = {"position_ids": (self.mask.cumsum(-1) - 1).clamp(min=0)[:, width:]}
        if any(map(images_in, prompts)):
            inputs = _seen(model, vision, prompts, ids, inputs["position_ids"])
        if past:
            inputs[self.argument] = cache_of(past)
        output = model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=self.mask,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
            **self.options,
        )
        self.cache = getattr(output, self.argument)
        # State-space models count no positions; their state already leaves the padding out.
        self.counts = "position_ids" in inspect.signature(type(model).forward).parameters
        self.logits = output.logits[:, -1]
        # Where a picture has rows and columns, the text behind it goes on at the largest of them.
        self.position = inputs["position_ids"].reshape(-1, *ids.shape)[-3:].amax(dim=(0, 2)) + 1
        if copies > 1:
            self._select(torch.arange(len(prompts), device=device).repeat_interleave(copies))

    def advance(self, tokens: torch.Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        inputs = {self.argument: self.cache}
        if self.counts:
            inputs |= {"attention_mask": self.mask, "position_ids": self.position[:, None]}
        output = self.model(input_ids=tokens[:, None], use_cache=True, **inputs, **self.options)
        self.position = self.position + 1
        self.logits = output.logits[:, -1]

    def keep(self, places: torch.Tensor) -> None:
        self._select(places)

    def read(self, row: int, ids: Ids) -> Read | None:
        """What was read of a row, whose tokens up to the last one that was appended are ``ids``."""
        return read_of(self.cache, row, self.mask, ids)

    def _select(self, places: torch.Tensor) -> None:
        self.cache.reorder_cache(places)  # the one selection that every kind of layer knows
        self.mask, self.position = self.mask[places], self.position[places]
        self.logits = self.logits.index_select(0, places)


class Whole:
    """One sequence without a cache: a whole pass for every token."""

    def __init__(self, model: Any, prompts: Sequence[Ids], copies: int = 1, vision: Vision | None = None) -> None:
        (prompt,) = prompts
        self.model, self.vision, self.images = model, vision, images_in(prompt)
        self.options = forward_options(model)
        self.ids = torch.tensor([list(prompt)], device=model.get_input_embeddings().weight.device)
        self._read()

    def advance(self, tokens: torch.Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self._read()

    def keep(self, places: torch.Tensor) -> None:
        """There is one row."""

    def _read(self) -> None:
        inputs: dict[str, Any] = {}
        if self.images:
            inputs = _alone(self.model, self.vision, Encoded(self.ids[0].tolist(), self.images))
        output = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1, **inputs, **self.options)
        self.logits = output.logits[:, -1]


class Apart:
    """Every row by itself, each copy with a pass of its own over the prompt.

    A row whose length comes into another regime is read anew: its cache holds the positions of the old one.

    Args:
        model: a causal LM.
        prompts: of the rows, each for all its copies.
        copies: of each prompt.
        kind: of each row.
        regimes: of the model's position encoding.
        vision: reads the pictures of the prompts.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Ids],
        copies: int = 1,
        kind: Callable[..., Decoding] = Together,
        regimes: Regimes = ONE_REGIME,
        vision: Vision | None = None,
    ) -> None:
        self.model, self.kind, self.regimes, self.vision = model, kind, regimes, vision
        self.ids = [Encoded(prompt, images_in(prompt)) for prompt in prompts for _ in range(copies)]
        self.rows = [self._read(ids) for ids in self.ids]
        self._gather()

    def advance(self, tokens: torch.Tensor) -> None:
        for place, (row, ids, token) in enumerate(zip(self.rows, self.ids, tokens.split(1), strict=True)):
            ids.append(int(token))
            if self.regimes.of(len(ids)) == self.regimes.of(len(ids) - 1):
                row.advance(token)
            else:
                self.rows[place] = self._read(ids)
        self._gather()

    def keep(self, places: torch.Tensor) -> None:
        chosen = places.tolist()
        self.rows, self.ids = [self.rows[i] for i in chosen], [self.ids[i] for i in chosen]
        self._gather()

    def _read(self, ids: Ids) -> Decoding:
        if self.regimes.moving:
            forget_lengths(self.model)
        return self.kind(self.model, [ids], vision=self.vision)

    def _gather(self) -> None:
        self.logits = torch.cat([row.logits for row in self.rows])


@dataclass(frozen=True)
class Ways:
    """How a model may be sampled.

    Args:
        together: whether one cache may hold several sequences.
        row: decodes a single sequence.
        resumes: whether a chat may go on from what was read of it a turn before.
    """

    together: bool = True
    row: Callable[..., Decoding] = Together
    resumes: bool = False

    def start(
        self,
        model: Any,
        prompts: Sequence[Ids],
        copies: int,
        longest: int,
        regimes: Regimes,
        vision: Vision | None = None,
        past: Sequence[Read] = (),
    ) -> Decoding:
        """Decode ``copies`` of every prompt, up to ``longest`` tokens in the longest row."""
        one = len({regimes.of(n) for n in (min(map(len, prompts)), longest)}) == 1
        if self.together and one:
            return Together(model, prompts, copies, vision, past)
        return Apart(model, prompts, copies, self.row, regimes, vision)


def _seen(model: Any, vision: Vision | None, prompts: Sequence[Ids], ids: np.ndarray, places: torch.Tensor) -> Any:
    """Further arguments of a pass over prompts with pictures, padded on the left."""
    assert vision is not None
    lengths = tuple(map(len, prompts))
    offsets = tuple((row + 1) * ids.shape[1] - length for row, length in enumerate(lengths))
    members, images = tuple(range(len(prompts))), tuple(map(images_in, prompts))
    batch = Packed(members, torch.from_numpy(ids), places.cpu(), offsets, lengths, images)
    return vision.inputs(model, model.base_model, batch)


def _alone(model: Any, vision: Vision | None, ids: Encoded) -> Any:
    """Further arguments of a pass over one sequence with pictures."""
    return _seen(model, vision, [ids], np.array([ids]), torch.arange(len(ids))[None])


def choose_decoding(
    model: Any, sequences: Sequence[Sequence[int]], limit: float, name: str = "", vision: Vision | None = None
) -> Ways:
    """The fastest way that gives the logits of a whole pass over each sequence alone.

    Args:
        model: a causal LM in evaluation mode.
        sequences: of at least ``STEPS + 1`` tokens; see :func:`opdengine.models.batching.probe_sequences`.
        limit: of the difference of logits, relative to the largest.
        name: of the model, for messages.
        vision: reads the pictures of sequences that have some.
    """
    ids = [Encoded(map(int, s), images_in(s)) for s in sequences]
    begun = [Encoded(s[:-STEPS], s.images) for s in ids]
    reads = [_whole_logits(model, s, vision) for s in ids]
    name = name or type(model).__name__
    if _exact(lambda: Together(model, begun, 2, vision), ids, reads, 2, limit, name):
        return Ways(resumes=vision is None and _resumes(model, begun, ids, reads, limit, name))
    if _exact(lambda: Apart(model, begun, vision=vision), ids, reads, 1, limit, name):
        logger.warning("%s: its cache holds one sequence at a time: it samples them in turn, which is slow", name)
        return Ways(together=False)
    logger.warning(
        "%s: its cache does not continue a sequence exactly: it is sampled without one, a whole pass for every token, "
        "which is slow (use_vllm samples the student elsewhere)",
        name,
    )
    return Ways(together=False, row=Whole)


STEPS = 8
"""Forced tokens of a probe, which takes rows away half-way."""


def _whole_logits(model: Any, ids: Encoded, vision: Vision | None) -> torch.Tensor:
    """Logits [STEPS + 1, V] that predict a sequence's last tokens and the one after it, from a pass without cache."""
    device = model.get_input_embeddings().weight.device
    output = model(
        input_ids=torch.tensor([list(ids)], device=device),
        use_cache=False,
        logits_to_keep=STEPS + 1,
        **(_alone(model, vision, ids) if ids.images else {}),
        **forward_options(model),
    )
    return _finite(output.logits[0, -STEPS - 1 :])


def _exact(
    start: Callable[[], Decoding],
    ids: Sequence[Ids],
    reads: Sequence[torch.Tensor],
    copies: int,
    limit: float,
    name: str,
) -> bool:
    """Whether decoding the last tokens of every sequence gives the logits of the whole pass."""
    members = [i for i in range(len(ids)) for _ in range(copies)]
    error = 0.0
    try:
        decoding = start()
        for step in range(STEPS + 1):
            expected = torch.stack([reads[i][step] for i in members])
            error = max(error, relative(_finite(decoding.logits), expected))
            if step == STEPS:
                break
            if step == 1:  # one row leaves, the others change places
                places = [*range(len(members) - 1, 1, -1), 0]
                members = [members[place] for place in places]
                decoding.keep(torch.tensor(places, device=expected.device))
            tokens = [ids[i][step - STEPS] for i in members]
            decoding.advance(torch.tensor(tokens, device=expected.device))
    except UNPROBED as reason:
        logger.info("%s: decoding %d copies fails: %s", name, copies, str(reason)[:200])
        return False
    if not error <= limit:
        logger.info("%s: decoding %d copies gives other logits (difference %.2g)", name, copies, error)
    return error <= limit


def _resumes(
    model: Any, begun: Sequence[Ids], ids: Sequence[Ids], reads: Sequence[torch.Tensor], limit: float, name: str
) -> bool:
    """Whether sequences go on exactly behind their beginnings, of several lengths, that were read before."""
    lengths = [len(s) // (i + 2) for i, s in enumerate(begun)]
    first = Together(model, [s[:n] for s, n in zip(begun, lengths, strict=True)])
    following = [s[n] for s, n in zip(begun, lengths, strict=True)]
    first.advance(torch.tensor(following, device=first.logits.device))
    found = [first.read(i, s[: n + 1]) for i, (s, n) in enumerate(zip(begun, lengths, strict=True))]
    past = [read for read in found if read is not None]
    return len(past) == len(begun) and _exact(lambda: Together(model, begun, past=past), ids, reads, 1, limit, name)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Logits of columns that are never chosen may be -inf."""
    return torch.nan_to_num(logits.float(), nan=torch.nan, neginf=0.0)
