"""The fused loss in a trainer of your own: two teachers, no logits, one call.

    python examples/fused_loss.py

Everything here is random; replace the hidden states by ``model.base_model(...).last_hidden_state`` and
the weights by ``model.get_output_embeddings().weight``.
"""

from __future__ import annotations

import torch

from opd_kernels import TeacherHead, linear_divergence


def main() -> None:
    """One forward and backward pass with per-token teacher weights."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, vocabulary = 256, 32_000
    hidden = torch.randn(tokens, 256, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, 256, device=device) / 16).requires_grad_()
    teachers = [
        TeacherHead(
            hidden=torch.randn(tokens, width, device=device),
            weight=torch.randn(vocabulary, width, device=device) / width**0.5,
        )
        for width in (512, 384)
    ]
    confidence = torch.rand(tokens, len(teachers), device=device)
    sampled = torch.randint(vocabulary, (tokens,), device=device)

    out = linear_divergence(
        hidden,
        weight,
        teachers,
        divergence="reverse_kl",
        mix=(confidence / 0.2).softmax(-1),
        token_weight=torch.full((tokens,), 1 / tokens, device=device),
        labels=sampled,
        stats=True,
    )
    out.loss.backward()
    assert out.stats is not None and out.stats.gap is not None
    print(f"loss {out.loss.item():.4f}, gradient of the head {weight.grad.norm().item():.4f}")
    print("mean gap log q_k(y) - log p(y) per teacher:", out.stats.gap.mean(0).tolist())


if __name__ == "__main__":
    main()
