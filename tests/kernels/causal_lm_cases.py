"""Tiny causal language models for the tests of ``opd_kernels.causal_lm``, and what their processes run.

Run as a script by the test: every rank has its half of the batch, and gradients are compared with those of the whole
batch on plain logits. Exits non-zero on the first difference.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
)

from opd_kernels import linear_divergence
from opd_kernels.adapters import trl_chunked_divergence_loss
from opd_kernels.causal_lm import in_place_of_head, teacher_head

VOCAB = 53
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "plain": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "bias": lambda: PhiConfig(**SIZES),
    "softcap": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "divided": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
}


def make(kind: str = "plain", seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A random model with logits that are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype).train()


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, 9), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def counted(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = inputs["attention_mask"].bool()
    rows[:, :2] = False
    return rows


def plain_loss(model: Any, teacher: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the reverse KL over the rows that count, from logits."""
    rows = counted(inputs)
    with torch.no_grad():
        other = teacher(**inputs).logits[rows].log_softmax(-1)
    own = model(**inputs).logits[rows].to(other.dtype).log_softmax(-1)
    return (own.exp() * (own - other)).sum()


def fused_loss(model: Any, teacher: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    rows = counted(inputs)
    judge = teacher_head(teacher, rows=rows, **inputs)
    return in_place_of_head(
        model, lambda hidden, head: linear_divergence(hidden[rows], head, [judge], **options).loss, **inputs
    )


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys() and ours
    largest = max(g.abs().max().item() for g in theirs.values())
    assert largest > 1e-4
    for name, gradient in theirs.items():
        error = (ours[name].double() - gradient.double()).abs().max().item() / largest
        assert error <= tolerance, (name, error)


# -------------------------------------------------------------------------------------------- several processes


def whole(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): g.full_tensor() if hasattr(g, "full_tensor") else g
        for name, g in named.items()
    }


def shard(model: Any, head: bool = False, policy: MixedPrecisionPolicy | None = None, frozen: bool = False) -> Any:
    """FSDP2 as accelerate applies it: the blocks, then the rest; or the head by itself, too."""
    options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    for block in model.model.layers:
        fully_shard(block, **options)
    if head:
        fully_shard(model.lm_head, **options)
    fully_shard(model, reshard_after_forward=True, **options)
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    return model


def run(rank: int, ranks: int, compiled: bool) -> None:
    inputs = batch(2 * ranks)
    mine = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}
    for kind in ("plain", "tied"):
        teacher = make(kind, seed=5)
        model = make(kind)
        # DDP and FSDP2 average over the ranks.
        want = gradients(model, plain_loss(model, teacher, inputs) / ranks)
        copies = compiled_copies(model) if compiled else split_copies(model, kind)
        for name, wrapped in copies.items():
            for reduction in ("sum", "none"):
                loss = fused_loss(wrapped, teacher, mine, reduction=reduction).sum()
                got = whole(gradients(wrapped, loss))
                assert_same(got, want), (kind, name)
            assert_same(whole(gradients(wrapped, plain_loss(wrapped, teacher, mine))), want)
        if compiled:
            return
        # Accumulation without communication, then with it.
        wrapped = copies["unused"]
        wrapped.zero_grad()
        parts = [{n: v[i : i + 1] for n, v in mine.items()} for i in range(2)]
        with wrapped.no_sync():
            fused_loss(wrapped, teacher, parts[0]).backward()
        fused_loss(wrapped, teacher, parts[1]).backward()
        assert_same(whole({n: p.grad for n, p in wrapped.named_parameters()}), want)
        # A teacher that is split, too.
        split = fused_loss(copies["blocks"], shard(copy.deepcopy(teacher)).requires_grad_(False), mine)
        assert_same(whole(gradients(copies["blocks"], split)), want)
    half(mine, inputs, ranks)
    gathered(mine, inputs, ranks)


def split_copies(model: Any, kind: str) -> dict[str, Any]:
    copies: dict[str, Any] = {
        "unused": DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True),
        "all used": DistributedDataParallel(copy.deepcopy(model)),
        "blocks": shard(copy.deepcopy(model)),
    }
    return copies | ({"head": shard(copy.deepcopy(model), head=True)} if kind == "plain" else {})


def compiled_copies(model: Any) -> dict[str, Any]:
    return {
        "around": torch.compile(DistributedDataParallel(copy.deepcopy(model)), backend="eager"),
        "inside": DistributedDataParallel(torch.compile(copy.deepcopy(model), backend="eager")),
    }


def half(mine: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], ranks: int) -> None:
    """Mixed precision of FSDP2: parameters are gathered in bfloat16."""
    teacher, model = make(seed=5, dtype=torch.float32), make(dtype=torch.float32)
    want = gradients(model, plain_loss(model, teacher, inputs) / ranks)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped = shard(copy.deepcopy(model), policy=policy)
    seen: list[torch.dtype] = []

    def loss(hidden: torch.Tensor, head: Any) -> torch.Tensor:
        seen.extend([hidden.dtype, head.weight.dtype])
        return linear_divergence(hidden[rows], head, [judge]).loss

    rows = counted(mine)
    judge = teacher_head(teacher, rows=rows, **mine)
    got = whole(gradients(wrapped, in_place_of_head(wrapped, loss, **mine)))
    assert seen == [torch.bfloat16] * 2
    assert_same(got, want, tolerance=0.1)


def gathered(mine: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], ranks: int) -> None:
    """A head's weight that TRL's loss gets split has the mean of the gradients over the ranks."""
    model, teacher, found = make(), make(seed=5), []
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    for part in (mine, inputs):
        with torch.no_grad():
            states = [m.model(**part).last_hidden_state for m in (model, teacher)]
        head = weight if part is mine else model.lm_head.weight
        loss, *_ = trl_chunked_divergence_loss(*states, head, teacher.lm_head.weight, counted(part), 1.0, 1)
        found += torch.autograd.grad(loss, head)
    torch.testing.assert_close(found[0].full_tensor(), found[1] / ranks)


def main() -> None:
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        run(rank, ranks, compiled=sys.argv[4] == "compiled")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
