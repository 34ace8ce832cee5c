"""A teacher in this process: its backbone scores, its head goes into the fused loss. It writes, too, or a
server that holds the same model does.

It works in a thread of its device, so that calls to servers go on meanwhile. Each device has one thread:
local teachers take turns, in the order in which they were asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from opd_kernels import LMHead
from opdengine.config.sections import TeacherConfig
from opdengine.data.templates import Reader
from opdengine.models.backbone import Backbone, load_model
from opdengine.models.chat import load_tokenizer
from opdengine.models.rendering import thought_opening
from opdengine.rollout.transformers import TransformersSampler
from opdengine.teachers import Configured
from opdengine.teachers.offload import Offload
from opdengine.teachers.prefix import PrefixScorer
from opdengine.teachers.server import ServedTeacher
from opdengine.teachers.shard import Session
from opdengine.teachers.threads import work_on
from opdengine.types import Completion, Failure, Hidden, Request, SamplingParams, TeacherContext

T = TypeVar("T")


class LocalTeacher(Configured):
    """A Hugging Face model as a frozen teacher.

    Args:
        config: what to load.
        device: where it lives.
        attn_implementation: see :func:`opdengine.models.backbone.load_model`.
        trust_remote_code: run code that comes with the model.
        max_tokens: token budget of one scoring or generation batch.
        tokenizer: of the model; None loads it.
        writer: writes its text; None: the weights here do.
        session: of the ranks that share the weights of a teacher with ``shard``; None: they are all here.
        bf16: passes run under autocast to bfloat16, and the head is bfloat16: of a copy of a student that has them so.
    """

    def __init__(
        self,
        config: TeacherConfig,
        *,
        device: torch.device | str = "cpu",
        attn_implementation: str = "auto",
        trust_remote_code: bool = False,
        max_tokens: int = 16384,
        tokenizer: Any = None,
        writer: ServedTeacher | None = None,
        session: Session | None = None,
        bf16: bool = False,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer or load_tokenizer(
            config.model,
            trust_remote_code=trust_remote_code,
            chat_template=config.chat_template,
            images=config.images,
        )
        self._reader = Reader(f"teacher {config.name!r}", self.tokenizer, config.chat_template_kwargs)
        model = load_model(
            config.model,
            dtype=config.dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device="cpu" if session is not None and config.shard else device,
            bf16=bf16,
            sees=getattr(self.tokenizer, "vision", None) is not None,
        )
        model.requires_grad_(False).eval()
        self._session = session
        self._sharded = session.add(model, torch.device(device)) if session is not None and config.shard else None

        def split() -> Backbone:
            vision = getattr(self.tokenizer, "vision", None)
            return Backbone(model, f"teacher {config.name!r}", max_tokens, bf16=bf16, vision=vision)

        self.backbone = split() if self._sharded is None else self._sharded.run(split)
        self._device = self.backbone.device  # offloaded weights are elsewhere between calls
        self._scorer = PrefixScorer(self.backbone)
        self.opening = thought_opening(self.tokenizer, config.chat_template_kwargs)
        self._generator = TransformersSampler(model, self.tokenizer, 4 * max_tokens, bf16, config.chat_template_kwargs)
        self._writer = writer
        if writer is None:
            prove = self._generator.prove
            prove() if self._sharded is None else self._sharded.run(prove)
        self.fingerprint = model_fingerprint(config.model, model)
        if writer is not None:  # a server does not tell which weights it holds
            self.fingerprint += f" {writer.fingerprint}"
        self._place = Offload(model, self._device) if config.offload else None

    @property
    def window(self) -> int | None:
        windows = (self.backbone.window, None if self._writer is None else self._writer.window)
        return min((w for w in windows if w is not None), default=None)

    @property
    def head(self) -> LMHead:
        return in_dtype_of_loss(self.backbone)

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion | Failure]:
        if self._writer is not None:
            return await self._writer.generate(requests, params)
        return [completions[0] for completions in await self._run(self._generator.generate, requests, params)]

    async def score(self, contexts: Sequence[TeacherContext]) -> list[Hidden]:
        ids, positions = [c.token_ids for c in contexts], [c.target_positions for c in contexts]
        images = [c.images for c in contexts]
        return [Hidden(rows) for rows in await self._run(self._scorer.score, ids, positions, images)]

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call in the thread of the device, with the weights there."""

        def work() -> T:
            with self._resident():
                return function(*arguments)

        if self._session is not None and self._sharded is not None:
            return await self._session.call(self._sharded, work)
        return await work_on(self._device, work)

    def _resident(self) -> AbstractContextManager[None]:
        return nullcontext() if self._place is None else self._place.resident()

    def counts(self) -> dict[str, float]:
        """Of the calls to its writer; calls in this process either work or raise."""
        return {} if self._writer is None else self._writer.counts()


def in_dtype_of_loss(backbone: Backbone) -> LMHead:
    """The head of a model whose states are bfloat16 under autocast, as the loss takes that of the student."""
    return backbone.head.to(torch.bfloat16) if backbone.bf16 else backbone.head


def model_fingerprint(path: str, model: Any, blocks: int = 256) -> str:
    """Identifies a model's weights without reading all of them.

    Hashes the configuration and, for local folders, name, size and evenly spaced blocks of every
    weight file (fine-tuning may leave its ends as they were).
    """
    digest = hashlib.sha256(model.config.to_json_string().encode())
    folder = Path(path).expanduser()
    if not folder.is_dir():
        digest.update(path.encode())
        return digest.hexdigest()[:16]
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as data:
            for block in range(blocks):
                data.seek(size * block // blocks)
                digest.update(data.read(1 << 12))
    return digest.hexdigest()[:16]
