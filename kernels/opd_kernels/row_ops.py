"""Which implementation runs."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from .chunk import RowOps, Task
from .chunking import ALIGNMENT, SCRATCH_TILES
from .torch_impl import TorchRowOps

logger = logging.getLogger("opd_kernels")


def choose_impl(impl: str, device: str, compute_dtype: torch.dtype, sharded: bool = False) -> str:
    """The implementation that runs; says once per process what "auto" means here.

    Args:
        impl: as the caller gave it.
        device: device type of the tensors.
        compute_dtype: float64 when every head is, else float32.
        sharded: the vocabulary is split over ranks.

    Raises:
        ValueError: impl="triton" cannot serve this device or dtype, or ``impl`` no split.
    """
    if impl == "reference" and sharded:
        raise ValueError("impl='reference' does not serve a vocabulary split over a group: use 'auto' or 'torch'")
    if impl == "auto":
        chosen = "triton" if device == "cuda" and compute_dtype == torch.float32 and has_triton() else "torch"
        _log_choice(chosen, device)
        return chosen
    if impl == "triton":
        if compute_dtype != torch.float32:
            raise ValueError(f"impl='triton' computes in float32, not in {compute_dtype}: use 'torch' or 'reference'")
        if not has_triton():
            raise ValueError("impl='triton' needs the triton package: install it, or use impl='torch'")
        if device != "cuda" and not interpreted():
            raise ValueError(
                f"impl='triton' needs CUDA tensors, got device {device!r}: use impl='torch' (tests run the kernels on "
                "a CPU with TRITON_INTERPRET=1, set before triton is imported)"
            )
    return impl


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is imported only when it is used."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether the kernels were made for triton's interpreter, which runs on CPU tensors."""
    from . import rows_math

    return rows_math.INTERPRETED


def row_layout(impl: str, vocab: int) -> tuple[int, int]:
    """(elements from one row of a buffer to the next, scratch tiles of the row operations)."""
    if impl != "triton":
        return vocab, SCRATCH_TILES
    return -(-vocab // ALIGNMENT) * ALIGNMENT, 0


def make_row_ops(impl: str, task: Task, tile_rows: int, vocab: int, like: Tensor) -> RowOps:
    """Row operations of ``impl`` for buffers with ``vocab`` columns of the dtype of ``like``."""
    if impl == "triton":
        from .triton_impl import TritonRowOps

        return TritonRowOps(task, vocab)
    return TorchRowOps(task, tile_rows, vocab, like)


@functools.cache
def _log_choice(impl: str, device: str) -> None:
    logger.info("opd_kernels: impl='auto' on %s uses %r", device, impl)
