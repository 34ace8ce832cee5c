"""Teachers: they write text for debates and judge token ids, by hidden states or by top-k log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from opdengine.errors import ServiceError
from opdengine.models.chat import encode_answer
from opdengine.types import Completion, Failure, Message, Request, SamplingParams, TeacherContext, TeacherTargets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from opd_kernels import LMHead
    from opdengine.config.sections import TeacherConfig
    from opdengine.data.templates import Reader
    from opdengine.models.alignment import Alignment


class TeacherError(ServiceError):
    """A teacher's call failed for good, and the run is told to stop then."""


class Teacher(Protocol):
    """A frozen model that writes and judges.

    A call that fails for good gives a :class:`Failure` in the place of its result, or raises
    :class:`TeacherError` where the run is told to stop.
    """

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
    def opening(self) -> str:
        """The thought that its chat template leaves open before its text; "" where it opens none."""
        ...

    @property
    def head(self) -> LMHead | None:
        """Its frozen output head; None where it judges by log-probs."""
        ...

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a chat in this teacher's own template, ready for its reply."""
        ...

    def encode_answer(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), sampled: Sequence[int] = ()
    ) -> list[int]:
        """Token ids between one reply and the next; see :func:`opdengine.models.chat.encode_answer`."""
        ...

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> Sequence[Completion | Failure]:
        """One completion per request, in order."""
        ...

    async def score(self, contexts: Sequence[TeacherContext]) -> Sequence[TeacherTargets | Failure]:
        """Its distributions at the targets of every context, in order."""
        ...

    def counts(self) -> dict[str, float]:
        """Metrics of its calls since this was last asked: failures by reason, retries."""
        ...


class Configured:
    """What its settings say of a teacher, and its chats in its own template."""

    config: TeacherConfig
    tokenizer: Any
    _reader: Reader
    alignment: Alignment | None = None
    """With the student's tokenizer, where this one is another; None: both are the same."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.config.key)

    @property
    def weight(self) -> float:
        return self.config.weight

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return self._reader.encode(messages, tools)

    def encode_answer(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), sampled: Sequence[int] = ()
    ) -> list[int]:
        return encode_answer(self.tokenizer, messages, tools, self.config.chat_template_kwargs, sampled)
