"""Float32 parameters under bfloat16 autocast: what each part computes in, and attention that needs half precision."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import loss_and_gradient, make_config, make_engine, make_samples
from test_backbone import make_model

from opd_kernels import heads
from opdengine.data.prompts import load_prompts
from opdengine.models.backbone import Backbone, fit_attention, load_model
from opdengine.models.packing import pack
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.build_student import halve_products
from opdengine.types import Batch, Request, SamplingParams

IDS = np.arange(1, 30, dtype=np.int64)


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype]]:
    """Of both factors of every product of the fused ops that gives logits."""
    seen = []

    def noted(head: Any, hidden: Any, *rest: Any, real: Any = heads.write_product) -> None:
        seen.append((hidden.dtype, head.weight.dtype))
        real(head, hidden, *rest)

    monkeypatch.setattr(heads, "write_product", noted)
    return seen


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["mt_opd", "camopd"])  # a divergence, and log-probs that are measured and trained
def test_the_loss_multiplies_in_the_dtype_of_the_run(
    models: dict[str, str],
    prompt_file: str,
    tmp_path: Path,
    dtypes: list[Any],
    method: str,
    bf16: bool,
) -> None:
    name = "bfloat16" if bf16 else "float32"
    teachers = [
        {"model": models[model], "key": [key], "dtype": name} for model, key in (("big", "agentic"), ("small", "code"))
    ]
    config = make_config(
        models, prompt_file, tmp_path, bf16=bf16, method=method, camopd={"domain": ["agentic"]}, teachers=teachers
    )
    engine = make_engine(config)
    loss_and_gradient(engine, make_samples(engine, load_prompts([prompt_file]).prompts[:2]))
    assert isinstance(engine.sampler, TransformersSampler) and engine.sampler.bf16 == bf16
    assert set(dtypes) == {(getattr(torch, name),) * 2}
    assert {p.dtype for p in engine.student.model.parameters()} == {torch.float32}


def test_the_sampler_computes_in_bfloat16_where_the_trainer_does(models: dict[str, str], tokenizer: Any) -> None:
    model = load_model(models["student"], bf16=True)
    request, params = [Request("r", tuple(IDS[:9].tolist()), 1)], SamplingParams(max_tokens=12)
    seen = set[torch.dtype]()
    model.model.layers[0].mlp.register_forward_hook(lambda *a: seen.add(a[2].dtype))
    ((halved,),) = TransformersSampler(model, tokenizer, bf16=True).generate(request, params)
    assert seen == {torch.bfloat16}
    ((plain,),) = TransformersSampler(model, tokenizer).generate(request, params)
    assert torch.float32 in seen
    assert not np.array_equal(halved.logprobs, plain.logprobs)


def test_weights_of_products_can_be_kept_in_half(models: dict[str, str], tokenizer: Any) -> None:
    """A sampler's copy of the student takes 2 bytes per weight of a linear layer and samples the same."""
    requests = [Request("a", tuple(IDS[:9].tolist()), 1), Request("b", tuple(IDS[:4].tolist()), 2)]
    for name in ("student", "big"):  # tied, and with a head of its own
        model = load_model(models[name], bf16=True)
        sampler = TransformersSampler(model, tokenizer, bf16=True)
        before = sampler.generate(requests, SamplingParams(max_tokens=12))
        weights = {n: w.clone() for n, w in model.state_dict().items()}
        halve_products(model)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert model.get_input_embeddings().weight.dtype == torch.float32
        for _ in range(2):  # as they are, and given anew in float32
            for one, other in zip(before, sampler.generate(requests, SamplingParams(max_tokens=12)), strict=True):
                assert one[0].token_ids.tolist() == other[0].token_ids.tolist()
                assert one[0].logprobs.tolist() == other[0].logprobs.tolist()
            sampler.load_policy(1, weights.items())


class FlashOnTheCPU:
    """The two functions of flash-attn that are used, with its refusal of float32; counts the calls of each."""

    def __init__(self) -> None:
        self.calls = {"one": 0, "packed": 0}

    def one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[B, L, heads, d]"""
        self.calls["one"] += 1
        return self._attend(q, k, v, kwargs)

    def packed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, **kwargs: Any
    ) -> torch.Tensor:
        """[total, heads, d]"""
        self.calls["packed"] += 1
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([self._attend(*(x[None] for x in part), kwargs)[0] for part in parts])

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kwargs: Any) -> torch.Tensor:
        if {q.dtype, k.dtype, v.dtype} - {torch.bfloat16, torch.float16}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        assert kwargs["causal"]
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        turned = [x.transpose(1, 2).float() for x in (q, k, v)]
        scale = kwargs.get("softmax_scale")
        attended = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True, scale=scale)
        return attended.transpose(1, 2).to(q.dtype)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashOnTheCPU:
    """Models whose configuration says flash_attention_2 attend by this."""
    from transformers import modeling_flash_attention_utils as utils

    found = FlashOnTheCPU()

    def only(**kwargs: Any) -> dict[str, Any]:
        return {"causal": kwargs.get("is_causal"), "softmax_scale": kwargs.get("softmax_scale")}

    functions: Any = (found.one, found.packed, None, None, None)
    paged = "process_paged_kwargs_fn" in inspect.getsource(utils._flash_attention_forward)  # newer transformers
    process = (only, only) if paged else only
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *a, **k: (functions, process))
    return found


def with_flash(path: str, **options: Any) -> Any:
    model = load_model(path, **options)
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize(("dtype", "bf16"), [("float32", True), ("bfloat16", False)])
def test_flash_attention_reads_packed_rows_as_separate_sequences(
    models: dict[str, str], flash: FlashOnTheCPU, dtype: str, bf16: bool
) -> None:
    backbone = Backbone(with_flash(models["big"], dtype=dtype, bf16=bf16), bf16=bf16)
    assert backbone.layout == "one_row" and flash.calls["packed"]
    sequences = [IDS[:12], IDS[5:25], IDS[3:8]]
    positions = [np.arange(2, len(s)) for s in sequences]
    flash.calls.update(one=0, packed=0)
    together = torch.cat(backbone.score(sequences, positions)).float()
    assert flash.calls == {"one": 0, "packed": 2}  # one pass of two layers
    plain = Backbone(load_model(models["big"]))
    exact = torch.cat(plain.score(sequences, positions))
    assert (together - exact).abs().max() < 0.05 * exact.abs().max()


def test_float32_without_autocast_never_meets_flash_attention(
    models: dict[str, str], flash: FlashOnTheCPU, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_flash(models["big"], dtype="float32")
    with pytest.raises(RuntimeError, match="only support fp16"):
        Backbone(model)
    fit_attention(model)
    assert "attention is sdpa" in caplog.text
    flash.calls.update(one=0, packed=0)
    assert Backbone(model).layout == "rows" and flash.calls == {"one": 0, "packed": 0}
    half = with_flash(models["big"], dtype="bfloat16")
    fit_attention(half)
    assert half.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("asked", ["auto", "sdpa", "flash_attention_2"])
def test_capped_attention_scores_are_never_left_out(
    asked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, flash: FlashOnTheCPU
) -> None:
    """SDPA has no cap of scores, and not every transformers says so."""
    model = make_model("gemma2", True, scale=16.0)
    assert model.config.attn_logit_softcapping
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    ids = torch.from_numpy(IDS[:12])[None]
    expected = model.eval()(input_ids=ids).logits
    if asked == "flash_attention_2":
        loaded = load_model(str(tmp_path), attn_implementation="eager")
        loaded.config._attn_implementation = asked
        fit_attention(loaded)
    else:
        loaded = load_model(str(tmp_path), attn_implementation=asked)
    assert torch.allclose(loaded.eval()(input_ids=ids).logits, expected, atol=1e-5)
    assert "eager" in caplog.text
    uncapped = make_model("gemma2", True, scale=16.0)
    for module in uncapped.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    missed = (uncapped.eval()(input_ids=ids).logits - expected).abs().max()
    assert missed > 0.1 * expected.abs().max()


def test_a_padded_batch_needs_no_mask(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's fast kernels take none; another keeps [L, L] per layer."""
    backbone = Backbone(load_model(models["student"]))
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noting(*args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(kwargs["attn_mask"])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    sequences = [IDS[:12], IDS[5:25], IDS[3:8]]
    targets = [np.arange(2, len(s)) for s in sequences]
    states = {}
    for layout in ("padded", "rows"):
        (batch,) = pack(sequences, max_tokens=100, layout=layout)
        masks.clear()
        with torch.no_grad():
            rows = backbone.hidden(batch, [targets[i] for i in batch.members])
        parts = dict(zip(batch.members, rows.split([len(targets[i]) for i in batch.members]), strict=True))
        states[layout] = torch.cat([parts[i] for i in range(3)])
        assert [m is None for m in masks] == [layout == "padded"] * 2
    torch.testing.assert_close(states["padded"], states["rows"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_tells_how_few_bfloat16_weights_a_step_moves(
    models: dict[str, str], prompt_file: str, tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first step of AdamW moves every weight that has a gradient by the learning rate."""
    config = make_config(models, prompt_file, tmp_path, dtype=dtype, learning_rate=1e-5, max_steps=1, warmup_ratio=0)
    engine = make_engine(config)
    told = "which with learning_rate=1e-05 is the fate of most"
    assert (told in caplog.text) == (dtype == "bfloat16")
    before = [p.detach().clone() for p in engine.student.model.parameters()]
    samples = make_samples(engine, load_prompts([prompt_file]).prompts[:4])
    engine.probed = True
    metrics = engine.update(Batch(samples=samples)).metrics
    pairs = [(one, p.detach()) for one, p in zip(before, engine.student.model.parameters(), strict=True)]
    moved = sum(int((one != now).sum()) for one, now in pairs) / sum(one.numel() for one in before)
    if dtype == "float32":
        assert "weights_moved" not in metrics and moved > 0.5
    else:
        assert metrics["weights_moved"] == pytest.approx(moved, abs=0.05) and 0 < moved < 0.2
