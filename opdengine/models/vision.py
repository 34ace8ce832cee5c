"""What a model that sees makes of pictures: its processor, run over chats, and the inputs of a pass.

A chat becomes token ids in which every picture has as many image tokens as it has features; the pixels are kept by
the content of the pictures. A pass over several sequences gets the pixels of all of them in the order of their tokens,
and positions in which a picture has rows and columns where the architecture counts so (M-RoPE).
"""

from __future__ import annotations

import inspect
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdengine.models.packing import Packed
from opdengine.models.pictures import open_picture, read_picture
from opdengine.models.rendering import MARK, image_part, render, text_of, text_part
from opdengine.types import Encoded, Image, Message, images_of

MOST_BYTES = 1 << 30
"""Of the pixels that a process keeps; beyond, the pictures that were not used for longest are processed anew."""

OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor returns for each token; everything else is of the pictures."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Pixels:
    """The pictures of one sequence as a processor gives them.

    Args:
        inputs: by the names of the model's arguments, on the host.
        tokens: number of image tokens in the sequence.
        text: that they were processed with.
        ids: of that text.
    """

    inputs: Tensors
    tokens: int
    text: str
    ids: tuple[int, ...]


class Vision:
    """A processor of ``transformers``, which turns chats with pictures into token ids and pixels.

    Args:
        processor: with ``image_processor`` and ``tokenizer``.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.marker = str(processor.image_token)
        """Stands for a picture in the text that the chat template prints."""
        self.token_ids = tuple(int(i) for i in processor.image_token_ids if i is not None)
        """Every id in a sequence that stands for a feature of a picture."""
        self._kept: OrderedDict[tuple[str, ...], Pixels] = OrderedDict()
        self._bytes = 0

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """Token ids of a chat with pictures.

        Raises:
            ValueError: the template leaves pictures out, a text holds the mark of a picture, or the processor
                refuses a picture.
        """
        images = images_of(messages)
        if any(self.marker in text_of(message.get("content")) for message in messages):
            raise ValueError(f"a text holds {self.marker!r}, which stands for a picture here; take it out of the text")
        text = render(self.processor.tokenizer, messages, tools, template_kwargs)
        if (places := text.count(self.marker)) != len(images):
            raise ValueError(
                f"the chat template prints {places} marks {self.marker!r} for {len(images)} pictures; give the model "
                "a chat_template that prints one for each"
            )
        kept = self._kept.get(_key(images))
        if kept is None or kept.text != text:  # all rollouts of a prompt are read behind the same text
            kept = self._process(text, images)
        self._keep(images, kept)
        return Encoded(kept.ids, images, text)

    def marked(self, text: str) -> list[int]:
        """Token ids of a chat's text in which a picture is one mark still: what vLLM puts its own tokens into."""
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pixels(self, images: tuple[Image, ...]) -> Pixels:
        """The pictures of one sequence, processed once."""
        key = _key(images)
        if key not in self._kept:
            self._keep(images, self._process(" ".join([self.marker] * len(images)), images))
        self._kept.move_to_end(key)
        return self._kept[key]

    def matches(self, ids: np.ndarray, images: tuple[Image, ...]) -> bool:
        """Whether a sequence has as many image tokens as its pictures have features."""
        return not images or int(np.isin(ids, self.token_ids).sum()) == self.pixels(images).tokens

    def _process(self, text: str, images: Sequence[Image]) -> Pixels:
        pictures = [open_picture(image) for image in images]
        try:
            found = self.processor(text=[text], images=pictures, add_special_tokens=False, return_tensors="pt")
        except Exception as error:  # processors raise what they like
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise ValueError(f"the model's processor cannot read the pictures ({sizes} pixels): {error}") from error
        ids = found["input_ids"][0].tolist()
        inputs = {name: tensor for name, tensor in found.items() if name not in OF_TOKENS}
        return Pixels(inputs, sum(i in self.token_ids for i in ids), text, tuple(ids))

    def _keep(self, images: Sequence[Image], pixels: Pixels) -> None:
        self._bytes += _size(pixels) - _size(self._kept.pop(_key(images), None))
        self._kept[_key(images)] = pixels
        while len(self._kept) > 1 and self._bytes > MOST_BYTES:
            self._bytes -= _size(self._kept.popitem(last=False)[1])

    def inputs(self, model: Any, trunk: Any, batch: Packed) -> dict[str, Any]:
        """Arguments of a pass over sequences with pictures, besides the token ids.

        Args:
            model: takes the arguments.
            trunk: the model without its head, which knows the positions.
            batch: laid out for it.

        Raises:
            ValueError: a sequence has other image tokens than its pictures have features.
        """
        device, dtype = model.get_input_embeddings().weight.device, model.dtype
        types = torch.isin(batch.input_ids, torch.tensor(self.token_ids)).long()
        parts = [self.pixels(images).inputs for images in batch.images]
        found = {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in _join(parts).items()
        }
        accepted = inspect.signature(type(trunk).forward).parameters
        found |= {name: types.to(device) for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}
        positions = batch.position_ids
        if counts_rows(trunk):
            positions = self._positions(trunk, batch, types)
        return {"position_ids": positions.to(device), **found}

    def _positions(self, trunk: Any, batch: Packed, types: torch.Tensor) -> torch.Tensor:
        """int64 [4, B, L]: the place of each token in its sequence, then time, row and column."""
        positions = batch.position_ids[None].repeat(4, 1, 1)
        width = batch.input_ids.shape[1]
        for offset, length, images in zip(batch.offsets, batch.lengths, batch.images, strict=True):
            row, start = divmod(offset, width)
            span = slice(start, start + length)
            found, _ = trunk.get_rope_index(
                input_ids=batch.input_ids[row, span][None],
                mm_token_type_ids=types[row, span][None],
                image_grid_thw=self.pixels(images).inputs["image_grid_thw"],
            )
            positions[1:, row, span] = found[:, 0]
        return positions

    def probe(self, behind: Sequence[int] = ()) -> list[Encoded]:
        """Chats with one picture, with two of other sizes, and with the first one again behind more text.

        Args:
            behind: ids that follow each chat; those that stand for pictures are left out.
        """
        noise = np.random.default_rng(0)
        one, two, three = (_noise(noise, size) for size in ((64, 96), (120, 56), (80, 80)))
        first, second, third, words = image_part(one), image_part(two), image_part(three), text_part(MARK)
        chats = [[first, words], [second, words, third, words], [words, words, first, words]]
        encoded = [self.encode([{"role": "user", "content": content}]) for content in chats]
        rest = [i for i in behind if i not in self.token_ids]
        return [Encoded([*ids, *rest], ids.images, "" if rest else ids.text) for ids in encoded]


def counts_rows(trunk: Any) -> bool:
    """Whether a model counts rows and columns of pictures; it tells sequences apart by a fourth count alone."""
    return hasattr(trunk, "get_rope_index")


def _key(images: Sequence[Image]) -> tuple[str, ...]:
    return tuple(image.sha256 for image in images)


def _noise(random: np.random.Generator, size: tuple[int, int]) -> Image:
    from PIL import Image as Pillow

    data = io.BytesIO()
    Pillow.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(data, "PNG")
    return read_picture(data.getvalue())


def _size(pixels: Pixels | None) -> int:
    return 0 if pixels is None else sum(t.numel() * t.element_size() for t in pixels.inputs.values())


def _join(parts: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """The pictures of several sequences as those of one.

    Processors either list all pictures along the first axis, or those of one sequence along the second, where pictures
    of several sizes are filled up with zeros.
    """
    joined = {}
    by_row = bool(parts) and parts[0]["pixel_values"].dim() == 5
    for name in parts[0] if parts else ():
        tensors = [part[name] for part in parts]
        axis = 1 if by_row else 0
        shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        padded = []
        for tensor in tensors:
            missing = [(0, 0 if d <= axis else shape[d] - tensor.shape[d]) for d in range(tensor.dim())]
            flat = [n for pair in reversed(missing) for n in pair]
            padded.append(torch.nn.functional.pad(tensor, flat))
        joined[name] = torch.cat(padded, dim=axis)
    return joined
