"""What an exact teacher elsewhere may be asked, and the form of each question."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from opdengine.models.pictures import MOST_IMAGES

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Label = Annotated[str, Field(max_length=200)]
Places = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_IMAGES)]
"""Of a sequence's pictures in the list of its question, in the order of its image tokens."""


class Asked(BaseModel):
    """Nothing that is not known, and no number that is written as text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Context(Asked):
    """A sequence to judge, by the positions of its targets."""

    name: Label
    ids: Annotated[list[TokenId], Field(min_length=1)]
    targets: list[TokenId]
    pictures: Places = []


class Question(Asked):
    """The pictures of a question in base64, each one once."""

    pictures: Annotated[list[str], Field(max_length=100_000)] = []


class Scoring(Question):
    """Contexts to judge."""

    contexts: Annotated[list[Context], Field(min_length=1, max_length=100_000)]
    dtype: Literal["auto", "float32", "bfloat16"]


class Prompt(Asked):
    """What is to be gone on with."""

    name: Label
    ids: Annotated[list[TokenId], Field(min_length=1)]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    pictures: Places = []


class Sampling(Asked):
    """How."""

    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    temperature: Annotated[float, Field(ge=0, le=1e6)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)]
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)]
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=10_000)]], Field(max_length=100)]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1000)]


class Writing(Question):
    """Prompts to go on with."""

    requests: Annotated[list[Prompt], Field(min_length=1, max_length=100_000)]
    sampling: Sampling
