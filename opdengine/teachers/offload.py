"""Frozen weights that stay on the CPU and visit the GPU while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Offload:
    """Keeps a frozen model's tensors on the CPU except within :meth:`resident`.

    The output embedding stays on the device (a tied input embedding with it): the loss reads it
    during the update. Going back to the CPU copies nothing, since the weights never change.

    Args:
        model: frozen, on ``device``.
        device: where it computes; on the CPU nothing is moved.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self._host: list[tuple[torch.Tensor, torch.Tensor]] = []
        if device.type == "cpu":
            return
        stay = {id(p) for p in model.get_output_embeddings().parameters()}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in stay:
                self._host.append((tensor, self._to_host(tensor.data)))
        self._leave()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The model is on its device within."""
        for tensor, host in self._host:
            tensor.data = self._to_device(host)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for tensor, host in self._host:
            tensor.data = host

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.device, non_blocking=True)

    def _to_host(self, data: torch.Tensor) -> torch.Tensor:
        host = data.to("cpu")
        return host.pin_memory() if self.device.type == "cuda" else host
