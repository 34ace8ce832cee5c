"""The bytes that each token of a tokenizer stands for, by which tokens of different tokenizers are compared.

Tokenizers write them in different ways: byte-level BPE has a character for every byte, SentencePiece a mark for a space
and ``<0x0A>`` for a byte that no other token has, others write what they mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opdengine.errors import ConfigError
from opdengine.models.chat import PROBES

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"

Parts = list[Mapping[str, Any]]


class TokenBytes:
    """What the tokens of a tokenizer stand for.

    Args:
        tokenizer: a fast one of transformers.
        name: of the model, for messages.

    Attributes:
        values: the bytes of every id; of a special token those of its name.
        special: ids of the special tokens -> their names.
        added: the same of all tokens that were added to the vocabulary, such as ``<think>``, which are not all special.
        byte_tokens: ids that stand for one byte each where other tokens stand for characters (``<0x0A>``).
        strips_space: whether the text of some tokens begins without the space of the first of them.

    Raises:
        ConfigError: the tokenizer is of a kind whose tokens' bytes cannot be told.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{name}: its tokenizer {type(tokenizer).__name__} is not a fast one (tokenizer.json), so nobody knows "
                "which bytes its tokens stand for, and tokenizer_alignment is not possible; convert it, or use another "
                "model"
            )
        parts = _decoders(json.loads(backend.to_str())["decoder"])
        read = _reading(parts)
        if read is None:
            kinds = [part["type"] for part in parts]
            raise ConfigError(
                f"{name}: its tokenizer's decoder {kinds} does not tell which bytes a token stands for (byte-level BPE "
                "and SentencePiece do), so tokenizer_alignment is not possible; use another model"
            )
        added = tokenizer.added_tokens_decoder
        names: dict[str, int] = tokenizer.get_vocab()
        self.special: dict[int, str] = {i: token.content for i, token in added.items() if token.special}
        self.added: dict[int, str] = {i: token.content for i, token in added.items()}
        self.values: list[bytes] = [b""] * (max(names.values()) + 1)
        self.byte_tokens: set[int] = set()
        for token, i in names.items():
            self.values[i] = added[i].content.encode() if i in added else read(token)
            if i not in added and BYTE.fullmatch(token) and len(self.values[i]) == 1:
                self.byte_tokens.add(i)
        self.strips_space = any(_strips(part) for part in parts)
        self._prove(tokenizer, name)

    def _prove(self, tokenizer: Any, name: str) -> None:
        """Compare with what the tokenizer itself says of the probes."""
        for probe in PROBES:
            ids = tokenizer.encode(probe, add_special_tokens=False)
            ours = b"".join(self.values[i] for i in ids).decode(errors="replace")
            theirs = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if ours not in (theirs, f" {theirs}"):
                raise ConfigError(
                    f"{name}: its tokenizer says {theirs!r} of tokens that seem to stand for {ours!r}, so their bytes "
                    "are not known and tokenizer_alignment is not possible; use another model"
                )


def _decoders(decoder: Mapping[str, Any] | None) -> Parts:
    """The parts of a decoder, in their order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _decoders(inner)]
    return [decoder]


def _reading(parts: Parts) -> Callable[[str], bytes] | None:
    """How a token's name becomes bytes; None: nobody knows."""
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        table = byte_characters()
        return lambda token: b"".join(table.get(c, c.encode()) for c in token)
    if not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    replaced = [(part["pattern"].get("String"), part["content"]) for part in parts if part["type"] == "Replace"]
    if any(old is None for old, _ in replaced):
        return None
    replaced += [(part.get("replacement", SPACE), " ") for part in parts if part["type"] == "Metaspace"]

    def read(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return read


def _strips(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Metaspace":
        return bool(part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True))
    return bool(part["type"] == "Strip" and part["content"] == " " and part["start"] > 0)


def byte_characters() -> dict[str, bytes]:
    """The characters of byte-level BPE: printable bytes are themselves, the others follow behind U+0100 in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): bytes([byte]) for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return table | {chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)}


def equal_tokens(own: TokenBytes, theirs: TokenBytes, first: tuple[int, int]) -> np.ndarray:
    """int64 [2, n]: ids of tokens with equal bytes, of the same kind where both have it; ``first`` is a pair.

    Added tokens of one name are a pair, too, where only one of them is special.
    """
    pairs = {first[0]: first[1]}
    taken = {first[1]}
    for kind in (_strict_kind, _kind, _is_added):
        found: dict[tuple[str, bytes], int] = {}
        for i, value in reversed([*enumerate(theirs.values)]):
            if value and i not in taken and (of := kind(theirs, i)):
                found[of, value] = i
        for i, value in enumerate(own.values):
            other = found.get((kind(own, i), value))
            if value and i not in pairs and other is not None and other not in taken:
                pairs[i] = other
                taken.add(other)
    return np.array([[*pairs.keys()], [*pairs.values()]], dtype=np.int64)


def _strict_kind(tokens: TokenBytes, i: int) -> str:
    """What a token is compared within first: one of a byte only with such."""
    return "byte" if i not in tokens.special and i in tokens.byte_tokens else _kind(tokens, i)


def _kind(tokens: TokenBytes, i: int) -> str:
    """What a token is compared within: a special token only with special ones."""
    return "special" if i in tokens.special else "text"


def _is_added(tokens: TokenBytes, i: int) -> str:
    """The same of added tokens; "" of all others, which are compared with nothing."""
    return "added" if i in tokens.added else ""
