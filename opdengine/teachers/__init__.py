"""Teachers: they write text for debates and judge token ids by hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from opdengine.types import Completion, Message, Request, SamplingParams, TeacherContext

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import torch

    from opdengine.backbone import Head


class Teacher(Protocol):
    """A frozen model that writes and judges."""

    @property
    def name(self) -> str: ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Routing keys it answers for; empty for all."""
        ...

    @property
    def weight(self) -> float:
        """Its fixed relative weight."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies its weights in caches."""
        ...

    @property
    def window(self) -> int | None:
        """Longest sequence it accepts, in tokens."""
        ...

    @property
    def head(self) -> Head:
        """Its frozen output head."""
        ...

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a chat in this teacher's own template, ready for its reply."""
        ...

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order."""
        ...

    async def score(self, contexts: Sequence[TeacherContext]) -> list[torch.Tensor]:
        """Final hidden states [T_i, d] that predict the targets of every context, in order."""
        ...
