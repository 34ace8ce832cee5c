"""What a batch does to a sequence: its hidden states must be those that the model gives to it alone.

That is found out before anything is trained, by passes over few tokens that reach the model's own limits:
its sliding windows and chunks, and the length at which its position encoding changes. A layout in which
sequences change each other is not used; a model whose tokens see later ones is refused.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from opdengine.models.packing import Packed, Regimes, pack
from opdengine.models.quantised import is_quantised
from opdengine.models.random_state import random_state, set_random_state

logger = logging.getLogger(__name__)

LIMIT = re.compile(r"window|chunk|block_size|compress|stride|index_topk")
"""Names of settings that tell how far a layer looks, or how many tokens it takes together."""

LONGEST_LIMIT = 4096
"""Tokens; limits beyond are not crossed by a probe, which would cost more than a step."""

SHORTEST_PROBE = 41
EXACT, ROUNDED, MOST_ROUNDED = 1e-4, 5e-2, 0.2
"""Relative differences that are rounding: in float32; in 16 bits at least and at most, see :func:`tolerance`."""
LEAST_ACAUSAL = 1e-3
"""Relative difference of hidden states, below which some architectures amplify rounding in float32."""

UNPROBED = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)
"""What a model's own code raises for input that it was not written for."""


def forward_options(model: Any) -> dict[str, bool]:
    """Arguments of a pass where a saved configuration asks for more than hidden states and logits.

    The auxiliary loss of a mixture of experts, for example, fails on a pass with a cache. Tuples instead of
    named outputs break transformers' own models, whatever a pass is told: that setting is changed.
    """
    configs = (model.config, model.config.get_text_config())
    for config in configs:
        if getattr(config, "return_dict", True) is False:
            config.return_dict = True
    asked = ("output_router_logits", "output_hidden_states", "output_attentions")
    return {name: False for name in asked if any(getattr(config, name, False) for config in configs)}


def cache_argument(model: Any) -> str:
    """Name of the cache, in what a pass takes and in what it returns: transformers 5.24 gave all kinds the same one."""
    known = inspect.signature(type(model).forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "past_key_values")


def window_of(config: Any) -> int | None:
    """Longest sequence that a model was built for, in tokens; None if it does not say."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    return window if isinstance(window, int) and window > 0 else None


def probe_sequences(config: Any, vocabulary: int, switch: int | None = None) -> list[np.ndarray]:
    """Four sequences of different lengths; the last one crosses the limits of the model's layers.

    Args:
        config: of the model.
        vocabulary: rows of its input embedding.
        switch: longest sequence of the first regime; no sequence is longer.
    """
    most = min((n for n in (window_of(config), switch) if n is not None), default=LONGEST_LIMIT + 9)
    crossed = [n for n in _limits(config.get_text_config().to_dict()) if n < min(most, LONGEST_LIMIT + 1)]
    longest = min(max([SHORTEST_PROBE, *(n + 9 for n in crossed)]), most)
    ids = (np.arange(1, longest + 24, dtype=np.int64) * 7919) % min(vocabulary, 32000)
    starts = np.cumsum([0, 5, 11, 7, longest])
    return [ids[a : min(b, a + most)] for a, b in pairwise(starts)]


def _limits(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _limits({f"{name}.{key}": entry for key, entry in value.items()})
        elif LIMIT.search(name):
            entries = value if isinstance(value, list | tuple) else [value]
            yield from (n for n in entries if type(n) is int and n > 0)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two tensors, relative to the largest entry of the second."""
    scale = expected.float().abs().max().clamp(min=1e-6)
    return ((found.float() - expected.float()).abs().max() / scale).item()


def typical(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of two tensors [L, d] in the token in the middle: few outliers do not count."""
    norms = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
    return float(norms.median())


def tolerance(noise: float) -> float:
    """The relative difference that is rounding in 16 bits.

    Deep models turn the same rounding into larger differences than shallow ones.

    Args:
        noise: what the same tokens in a pass of another shape differ by.
    """
    return min(max(ROUNDED, 3 * noise), MOST_ROUNDED)


def prove_causal(
    name: str, model: Any, ids: np.ndarray, states: Callable[[np.ndarray], torch.Tensor], exact: bool
) -> float:
    """Find what counts as rounding in a model's hidden states, and refuse it where they depend on later tokens.

    In float32 a sequence is read without its last tokens. In 16 bits a pass over fewer tokens rounds otherwise, which
    hides what is seen of later ones, so that these are replaced by others: that changes no bit of what comes before,
    except where experts, or the scales of activations, are shared by all tokens of a pass.

    Args:
        name: of the model, for messages.
        model: a causal LM in evaluation mode.
        ids: int64 [L] a sequence that crosses the limits of the model's layers.
        states: ids [L'] -> hidden states [L', d] of the model in evaluation mode.
        exact: whether it computes in float32.

    Returns:
        The relative difference that is rounding.

    Raises:
        ValueError: a token's hidden state depends on later tokens.
    """
    whole = states(ids)
    cuts = [len(ids) * part // 3 for part in (1, 2)]
    noise = max(relative(states(ids[:cut]), whole[:cut]) for cut in cuts)
    error, allowed = (noise if exact else 0.0), LEAST_ACAUSAL
    if not exact:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        for cut in cuts:
            found = states(np.concatenate([ids[:cut], (ids[cut:] + 1) % vocabulary]))[:cut]
            error = max(error, typical(found, whole[:cut]))
        if is_quantised(model) or any("expert" in part for part, _ in model.named_modules()):
            allowed = ROUNDED
    if error > allowed:
        raise ValueError(
            f"{name}: the hidden states of its tokens depend on later tokens (relative difference {error:.2g}, "
            f"allowed {allowed:g}); only causal (decoder) language models can be trained or judge on policy"
        )
    return EXACT if exact else tolerance(noise)


def find_regimes(model: Any, states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Regimes:
    """Whether a short sequence changes when a longer one is in its pass, and from which length on.

    Costs no long passes: a second row of as few tokens has far positions.

    Args:
        model: a causal LM in evaluation mode.
        states: (ids [B, L], position ids [B, L]) -> hidden states [B, L, d].
    """
    farthest, config = window_of(model.config), model.config.get_text_config()
    if farthest is None or farthest < 16:
        return Regimes()
    if any("dynamic" in str(getattr(m, "rope_type", "")) for m in model.modules()):
        farthest *= 2  # such an encoding changes beyond what it calls the longest sequence
    count = min(32, farthest // 8)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.from_numpy((np.arange(2 * count) * 7919 + 1) % min(vocabulary, 32000)).view(2, count)

    def beside(length: int) -> torch.Tensor:
        forget_lengths(model)
        positions = torch.stack([torch.arange(count), torch.arange(length - count, length)])
        return states(ids, positions)[0]

    alone = beside(count)
    # What is near changes nothing but the rounding, in a mixture of experts for example.
    limit = max(3 * relative(beside(2 * count), alone), 1e-6)
    if relative(beside(farthest), alone) <= limit:
        return Regimes()
    low, high = 2 * count, farthest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if relative(beside(middle), alone) <= limit else (low, middle)
    moving = relative(beside(farthest), beside(high)) > limit
    forget_lengths(model)
    if moving:  # it begins imperceptibly, at a length that the configuration names
        named = [n for n in _named_lengths(config.to_dict()) if 2 * count <= n <= low]
        low = max(named, default=low)
    return Regimes(low, moving)


def _named_lengths(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _named_lengths(value)
        elif "position" in str(name) and type(value) is int:
            yield value


def forget_lengths(model: Any) -> None:
    """Give dynamic position encodings the frequencies that they begin with: they keep those of the longest pass."""
    ending = "original_inv_freq"
    for module in model.modules():
        if "dynamic" not in str(getattr(module, "rope_type", "")):
            continue
        for name, frequencies in list(module.named_buffers(recurse=False)):
            if name.endswith(ending):
                prefix = name.removesuffix(ending)
                setattr(module, f"{prefix}inv_freq", frequencies.clone())
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def choose_layout(
    name: str,
    sequences: Sequence[np.ndarray],
    hidden: Callable[[Packed, Sequence[np.ndarray]], torch.Tensor],
    preferred: str,
    limit: float,
) -> str:
    """The first layout in which every sequence gets the hidden states that it has alone.

    Args:
        name: of the model, for messages.
        sequences: see :func:`probe_sequences`; within one regime.
        hidden: (batch, target positions of its members) -> hidden states [T, d] of the model in evaluation mode.
        preferred: layout that is tried first.
        limit: of the relative difference.

    Raises:
        ValueError: no layout reproduces them.
    """

    def read(layout: str) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for batch in pack(sequences, max_tokens=sum(map(len, sequences)) * len(sequences), layout=layout):
            wanted = [np.arange(1, len(sequences[i]) + 1) for i in batch.members]
            states = hidden(batch, wanted).split([len(p) for p in wanted])
            found |= dict(zip(batch.members, states, strict=True))
        return [found[i] for i in range(len(sequences))]

    expected, findings = torch.cat(read("alone")), []
    for layout in dict.fromkeys((preferred, "padded", "alone")):
        try:
            error = relative(torch.cat(read(layout)), expected)
        except UNPROBED as reason:
            findings.append(f"in {layout!r} batches it fails ({str(reason)[:200]})")
            continue
        if error <= limit:
            if layout != preferred:
                used = "padded batches" if layout == "padded" else "a pass for every sequence alone, which is slow"
                logger.warning("%s: %s: using %s", name, "; ".join(findings), used)
            return layout
        findings.append(f"sequences in {layout!r} batches see each other (difference {error:.2g})")
    raise ValueError(f"{name}: its hidden states cannot be reproduced: {'; '.join(findings)}")


def choose_image_layout(
    name: str,
    sequences: Sequence[np.ndarray],
    lay_out: Callable[[Sequence[int], str], list[Packed]],
    hidden: Callable[[Packed, Sequence[np.ndarray]], torch.Tensor],
    preferred: str,
    limit: float,
) -> str:
    """The first layout in which sequences with pictures get the hidden states that they have alone.

    Args:
        name: of the model, for messages.
        sequences: with pictures of several sizes.
        lay_out: (indices of sequences, layout) -> batches of them.
        hidden, preferred, limit: see :func:`choose_layout`.

    Raises:
        ValueError: the model cannot read a sequence with pictures even alone.
    """

    def read(members: Sequence[int], layout: str) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for batch in lay_out(members, layout):
            own = [members[i] for i in batch.members]
            wanted = [np.arange(1, len(sequences[i]) + 1) for i in own]
            states = hidden(batch, wanted).split([len(p) for p in wanted])
            found |= dict(zip(own, states, strict=True))
        return [found[i] for i in members]

    everyone = range(len(sequences))
    try:
        expected = torch.cat([read([i], "alone")[0] for i in everyone])
    except UNPROBED as reason:
        said = " ".join(str(reason).split())[:300]
        raise ValueError(f"{name}: it cannot read a chat with a picture ({said}); take another model") from reason
    for layout in dict.fromkeys((preferred, "padded")):
        try:
            error = relative(torch.cat(read(everyone, layout)), expected)
        except UNPROBED as reason:
            logger.info("%s: pictures in %r batches fail (%s)", name, layout, str(reason)[:200])
            continue
        if error <= limit:
            return layout
        logger.info("%s: pictures in %r batches change each other (difference %.2g)", name, layout, error)
    logger.warning("%s: sequences with pictures are read alone, one pass for each, which is slow", name)
    return "alone"


def changes_in_training(model: Any, states: Callable[[], torch.Tensor], limit: float) -> bool:
    """Whether a pass in training mode draws random numbers or is another than in evaluation mode.

    The mode and all random states are left as they were.

    Args:
        model: in whatever mode.
        states: a pass over some tokens.
        limit: of the relative difference.
    """
    training, before = model.training, random_state()
    try:
        model.train()
        found = states()
        after = random_state()
        drawn = any(not torch.equal(before[name], after[name]) for name in before if name != "python_gauss")
        model.eval()
        return drawn or relative(found, states()) > limit
    finally:
        model.train(training)
        set_random_state(before)
