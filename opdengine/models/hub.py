"""Names that neither this machine nor the Hugging Face hub knows: what is wrong, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

NO_ANSWER = frozenset(
    {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException"}
)
NO_ACCESS = frozenset({"GatedRepoError", "DisabledRepoError"})
NO_SUCH = frozenset({"RepositoryNotFoundError", "DatasetNotFoundError"})
NO_NAME = frozenset({"HFValidationError"})


def hub_problem(name: str, error: BaseException, *, data: bool = False) -> str | None:
    """Why a name could not be found and what to do, to follow the name in a sentence; None: it failed otherwise.

    Args:
        name: of a model or a data set, as it was given.
        error: of ``transformers``, ``datasets`` or ``huggingface_hub``; its causes are looked through.
        data: whether it is a data set.
    """
    kinds = kinds_of(error)
    local = "file or folder" if data else "folder"
    if kinds & NO_ACCESS:
        page = f"https://huggingface.co/{'datasets/' if data else ''}{name}"
        return f"may not be read from the Hugging Face hub: accept its terms at {page} and log in with 'hf auth login'"
    if kinds & NO_SUCH:
        return (
            f"is no {local} here, and the Hugging Face hub has none of this name that you may read: correct it, or log "
            "in with 'hf auth login' where it is private"
        )
    if kinds & NO_NAME:
        return f"is no {local} here, and no name that the Hugging Face hub could have (OWNER/NAME): correct it"
    if kinds & NO_ANSWER:
        switch = next((f"{key}={os.environ[key]} is set" for key in OFFLINE if os.environ.get(key)), "no connection")
        kind = "--repo-type dataset " if data else ""
        return (
            f"is no {local} here, is not whole in the cache of the Hugging Face hub, and the hub cannot be asked "
            f"({switch}): correct the name, give a {local}, or fetch it where there is a network with "
            f"'hf download {kind}{name}'"
        )
    return None


def kinds_of(error: BaseException) -> set[str]:
    """Names of the classes of an error and of what led to it."""
    return {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
