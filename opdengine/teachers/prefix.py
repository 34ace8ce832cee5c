"""Contexts that begin alike are read once: samples of one prompt share the teacher's transcript."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from opdengine.models.backbone import Backbone
from opdengine.models.batching import UNPROBED, cache_argument, relative
from opdengine.types import Image

logger = logging.getLogger(__name__)

LEAST_SAVED = 1024
"""Tokens that a shared prefix must save; below, the two extra passes cost more."""
LEAST_WORK = 1e10
"""The same in floating-point operations, for CPUs: they compute so slowly that a wide model's passes cost little more
than their products."""


def saved_tokens(prefix: int, lengths: Sequence[int]) -> int:
    """How many tokens fewer are read where sequences of these lengths share a prefix: the rest of each is padded."""
    longest = max(lengths, default=0)
    return sum(lengths) - prefix - len(lengths) * (longest - prefix)


class PrefixScorer:
    """Scores like :meth:`Backbone.score`, with one pass over every prefix that several contexts share.

    Args:
        backbone: whose cache of keys and values serves all continuations of a prefix. A model that
            cannot do this exactly (found out at first use) is scored the plain way.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._exact: bool | None = None
        self._weights: int = sum(p.numel() for name, p in backbone.trunk.named_parameters() if "embed" not in name)

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[np.ndarray],
        target_positions: Sequence[np.ndarray],
        images: Sequence[tuple[Image, ...]] = (),
    ) -> list[torch.Tensor]:
        """Hidden states [T_i, d] predicting the targets of every sequence, without gradient, on the host.

        Sequences with pictures are scored the plain way.
        """
        images = images or [()] * len(sequences)
        groups: dict[bytes, list[int]] = {}
        for i, (ids, positions) in enumerate(zip(sequences, target_positions, strict=True)):
            if images[i]:
                continue
            # The state that predicts the first target is not part of what is shared.
            shared = ids[: max(int(positions[0]) - 1, 0)] if len(positions) else ids[:0]
            groups.setdefault(shared.tobytes(), []).append(i)
        paying = []
        for key, group in groups.items():
            lengths = [len(sequences[i]) for i in group]
            if saved_tokens(len(key) // 8, lengths) >= self.least_saved and not self._far(lengths):
                paying.append(group)
        if paying and self._exact is None:
            self._exact = self._prove()
        found: dict[int, torch.Tensor] = {}
        for group in paying if self._exact else ():
            prefix = int(target_positions[group[0]][0]) - 1
            rows = self._continue([sequences[i] for i in group], [target_positions[i] for i in group], prefix)
            found |= dict(zip(group, rows, strict=True))
        rest = [i for i in range(len(sequences)) if i not in found]
        plain = self.backbone.score(
            [sequences[i] for i in rest], [target_positions[i] for i in rest], [images[i] for i in rest]
        )
        found |= dict(zip(rest, plain, strict=True))
        return [found[i] for i in range(len(sequences))]

    @property
    def least_saved(self) -> float:
        """Tokens that sharing a prefix must save; every weight multiplies and adds once for a token."""
        if self.backbone.device.type != "cpu":
            return LEAST_SAVED
        return min(LEAST_SAVED, LEAST_WORK / (2 * max(self._weights, 1)))

    @torch.no_grad()
    def _continue(
        self, sequences: Sequence[np.ndarray], target_positions: Sequence[np.ndarray], prefix: int
    ) -> list[torch.Tensor]:
        """The sequences share their first ``prefix`` ids and have no predictor of a target there."""
        trunk, device = self.backbone.trunk, self.backbone.device
        start = torch.from_numpy(sequences[0][:prefix])[None].to(device)
        options = self.backbone.options
        argument = cache_argument(trunk)
        with self.backbone.autocast():
            cache = getattr(trunk(input_ids=start, use_cache=True, **options), argument)
        longest = max(len(s) for s in sequences)
        # As many new tokens as in any pass, and four times as many with those in the cache.
        budget = self.backbone.max_tokens
        size = max(min(4 * budget // longest, budget // (longest - prefix)), 1)
        found = []
        for first in range(0, len(sequences), size):
            members = range(first, min(first + size, len(sequences)))
            width = max(len(sequences[i]) for i in members) - prefix
            # What is padded on the right comes after everything that is read.
            ids = torch.zeros(len(members), width, dtype=torch.int64)
            for row, i in enumerate(members):
                ids[row, : len(sequences[i]) - prefix] = torch.from_numpy(sequences[i][prefix:])
            copies = copy.deepcopy(cache) if members[-1] + 1 < len(sequences) else cache
            copies.reorder_cache(torch.zeros(len(members), dtype=torch.int64, device=device))
            positions = torch.arange(prefix, prefix + width, device=device)[None].expand(len(members), -1)
            reading = {argument: copies, "position_ids": positions, "use_cache": True, **options}
            with self.backbone.autocast():
                states = trunk(input_ids=ids.to(device), **reading).last_hidden_state
            states = states.to(torch.bfloat16) if self.backbone.bf16 else states
            for row, i in enumerate(members):
                places = torch.from_numpy(np.asarray(target_positions[i]) - 1 - prefix).to(device)
                found.append(states[row].index_select(0, places).cpu())
        return found

    def _far(self, lengths: Iterable[int]) -> bool:
        """Whether any is in another regime of position encodings than the prefix alone may be."""
        return any(self.backbone.regimes.of(length) for length in lengths)

    def _prove(self) -> bool:
        """Whether continuing a prefix, which crosses the model's own limits, gives what reading the whole gives."""
        rest, *_, long = self.backbone.probe_sequences()
        prefix = len(long) - 12
        ids = np.concatenate([long, rest])
        sequences = [np.concatenate([ids[:prefix], ids[prefix + k : prefix + 8 + k]]) for k in (0, 2, 4)]
        sequences = [s[: len(s) - cut] for s, cut in zip(sequences, (3, 0, 1), strict=True)]
        positions = [np.arange(prefix + 1, len(s)) for s in sequences]
        plain = torch.cat(self.backbone.score(sequences, positions)).float()
        try:
            shared = torch.cat(self._continue(sequences, positions, prefix)).float()
            error = relative(shared, plain)
        except UNPROBED as reason:
            logger.warning("%s: prefixes are not shared (%s)", self.backbone.name, reason)
            return False
        if error > self.backbone.tolerance:
            logger.warning("%s: prefixes are not shared (difference %.2g)", self.backbone.name, error)
        return error <= self.backbone.tolerance
