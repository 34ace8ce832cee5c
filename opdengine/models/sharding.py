"""A model whose parameters are split over the processes of a run (FSDP2), and its tensors whole again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from opdengine.distributed import Ranks

T = TypeVar("T")


class Sharded(nn.Module):
    """A model whose parameters are split over the ranks (FSDP2).

    Every transformer block is gathered while it computes. Final norm and head (with tied embeddings the
    input embedding, too) belong to this module: they are gathered once for a forward and backward pass,
    so a fused loss inside of it sees the head whole, and its gradient is reduced with the others'.

    Args:
        model: a causal LM; its parameters are split in place and moved to ``device``.
        ranks: of the run.
        device: of this rank.
        bf16: gather parameters in bfloat16; gradients are reduced in float32 always.
        head: "gathered" as above; "whole" on every rank, for a frozen model (a tied input embedding with
            it); "rows": every rank keeps its part of the vocabulary, which is never gathered for the loss.
        mesh: of the ranks; with it no rank waits for another here.
    """

    def __init__(
        self,
        model: Any,
        ranks: Ranks,
        device: torch.device,
        bf16: bool = False,
        head: str = "gathered",
        mesh: Any = None,
    ) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        super().__init__()
        self.model = model
        self.ranks = ranks
        self.head = head
        self.dtype = torch.bfloat16 if bf16 else None
        mesh = mesh or ranks.mesh(device)
        policy = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        embedding, layer = model.get_input_embeddings(), model.get_output_embeddings()
        tied = embedding.weight is layer.weight
        if not tied or head == "rows":
            fully_shard(embedding, mesh=mesh, mp_policy=policy)
        if head == "whole":
            layer.to(device)
        if head == "rows":
            _split_rows(layer, mesh, embedding.weight if tied else None)
        kept = set() if head == "gathered" else set(layer.parameters())
        fully_shard(self, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=kept)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale
                module.set_gradient_divide_factor(1.0)

    def forward(self, function: Callable[[], T]) -> T:
        """Call a function of the whole head and the model's blocks."""
        return function()

    def gather(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that no pass gathers, whole, detached and in the dtype of the passes."""
        return whole(parameter).to(self.dtype or parameter.dtype)

    def release(self) -> None:
        """Split what a pass without backward has left gathered."""
        self.reshard()  # type: ignore[operator]


def _split_rows(layer: nn.Module, mesh: Any, tied: nn.Parameter | None) -> None:
    """Give every rank its rows of a head; ``tied`` is the input embedding's weight, split already."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, parameter in list(layer.named_parameters(recurse=False)):
        if name == "weight" and tied is not None:
            layer.weight = tied
            continue
        rows = distribute_tensor(parameter.detach().to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)
        setattr(layer, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def transformer_blocks(model: Any) -> list[nn.Module]:
    """The layers of the longest list of equal layers, of a model that sees in its language model.

    A tower that makes features of pictures is gathered whole for a pass, as the head is: a rank whose sequences have
    no pictures runs none of its layers, and would leave the others waiting.

    Raises:
        ValueError: there is no such list.
    """
    model = model.get_decoder() if getattr(model.config, "vision_config", None) is not None else model
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of transformer blocks; train it on one process")
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    return list(lists[sizes.index(max(sizes))])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split over the ranks, whole and detached; all ranks call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def split_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, split as the parameter is, on its device."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_weights(model: Any, host: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """``state_dict().items()`` with every tensor whole, one after the other; all ranks read all of it.

    Args:
        model: possibly split over the ranks.
        host: bring the tensors to the CPU. Tied ones stay one tensor.
    """
    state = model.state_dict(keep_vars=True)
    uses = Counter(id(value) for value in state.values())
    shared: dict[int, torch.Tensor] = {}
    for name, value in state.items():
        tensor = shared.get(id(value))
        if tensor is None:
            tensor = whole(value).cpu() if host else whole(value)
        if uses[id(value)] > 1:
            shared[id(value)] = tensor
        yield name, tensor
