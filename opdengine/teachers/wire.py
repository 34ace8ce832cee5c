"""What an exact teacher on another machine and the trainer say to each other, and how it is written.

Questions are JSON. An answer is one line of JSON, and behind it the bytes of the tensors that the line describes
(little-endian, row by row): hidden states are neither text nor ever held twice. Every answer says of which weights it
is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opdengine.models.chat import PROBES

PROTOCOL = 2
"""Raised when either side could misread the other."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""In which tensors are sent."""

MOST_LINE = 4 << 20
"""Bytes of the line of an answer, and of a whole answer without tensors."""

GENERATION = 4
"""Tokens of prompts and completions in one question, as a multiple of those of contexts."""


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host; what is written to them is in the tensor."""
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view


def shapes(tensors: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """How the line of an answer describes its tensors."""
    return [{"shape": list(t.shape), "dtype": name_of(t.dtype)} for t in tensors]


def digest_of(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identifies a vocabulary, and how text becomes ids; chat templates are no part of it."""
    texts = [*PROBES, *sorted(tokenizer.get_added_vocab())]
    encoded = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return digest_of([sorted(tokenizer.get_vocab().items()), encoded, tokenizer.eos_token_id])


def weights_fingerprint(contents: Mapping[str, str], dtype: torch.dtype) -> str:
    """Identifies weights by the content of their files, and by the dtype in which they compute."""
    return digest_of([dict(contents), name_of(dtype)])
