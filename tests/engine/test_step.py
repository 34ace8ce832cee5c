"""One step against plain torch: full logits of the whole models in float64, no packing, no chunks."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import (
    assert_same_gradients,
    divergence,
    full_logprobs,
    loss_and_gradient,
    make_config,
    make_engine,
    make_samples,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, GptOssConfig, GptOssForCausalLM

from opdengine.data.prompts import load_prompts
from opdengine.models.chat import load_tokenizer, vocabulary_size
from opdengine.training.optimizer import build_optimizer
from opdengine.types import Completion, Prompt, Request, Sample, SamplingParams, TeacherContext

Models = dict[str, str]


@pytest.fixture(scope="module")
def prompts(prompt_file: str) -> Sequence[Prompt]:
    return load_prompts([prompt_file]).prompts


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def question(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


def expected_loss(
    models: Models,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    kind_of: dict[str, str],
    weights: Sequence[float],
    normalization: str,
    question_of: Any = None,
    temperature: float = 1.0,
) -> float:
    """sum_k w_k D(p_Tk || p_S) at every sampled token, averaged as the settings say."""
    vocab = vocabulary_size(tokenizer)
    means, total, count = [], 0.0, 0
    for sample in samples:
        rollout = sample
        answer = rollout.target_ids
        prefix = chat_ids(tokenizer, question(rollout.prompt))
        assert rollout.token_ids.tolist() == prefix + answer.tolist()
        student = full_logprobs(
            models["student"], rollout.token_ids.tolist(), len(prefix) + np.arange(len(answer)), vocab
        )
        student = (student / temperature).log_softmax(-1)
        loss = torch.zeros(len(answer), dtype=torch.float64)
        for k, name in enumerate(["big", "small"]):
            text = question(rollout.prompt) if question_of is None else question_of(rollout.prompt, k)
            context = chat_ids(tokenizer, text)
            teacher = full_logprobs(
                models[name], context + answer.tolist(), len(context) + np.arange(len(answer)), vocab
            )
            teacher = (teacher / temperature).log_softmax(-1)
            loss += weights[k] * divergence(kind_of[rollout.prompt.key], student, teacher)
        means.append(loss.mean().item())
        total, count = total + loss.sum().item(), count + len(answer)
    return total / count if normalization == "token" else float(np.mean(means))


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_loss_of_mt_opd_equals_plain_torch(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path, kind: str,
    normalization: str,
) -> None:  # fmt: skip
    config = make_config(models, prompt_file, tmp_path, divergence=kind, loss_normalization=normalization)
    engine = make_engine(config)
    samples = make_samples(engine, prompts[:4])
    # Rollouts of equal length could not tell the two means apart.
    rollout = samples[0]
    assert len({len(i.target_ids) for i in samples}) >= 1 and rollout.target_ids.size
    loss, _ = loss_and_gradient(engine, samples)
    expected = expected_loss(
        models, tokenizer, samples, kind_of={"code": kind, "agentic": kind}, weights=[0.75, 0.25],
        normalization=normalization,
    )  # fmt: skip
    assert loss == pytest.approx(expected, rel=1e-4)
    assert loss > 0.01


def shortened(engine: Any, prompts: Sequence[Prompt], keep: Sequence[int]) -> list[Sample]:
    """Items whose completions have the given lengths: teachers answer, so any length can be asked for."""
    plain = engine.sampler.generate

    def generate(requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        return [
            [
                Completion(c.token_ids[:n], c.logprobs[:n], "length", c.text)
                for c in completions
            ]
            for completions, n in zip(plain(requests, params), keep, strict=True)
        ]  # fmt: skip

    engine.sampler.generate = generate
    try:
        return make_samples(engine, prompts)
    finally:
        del engine.sampler.generate


def test_token_and_sequence_means_differ_as_their_closed_forms_do(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    found = {}
    for mode in ("token", "sequence"):
        engine = make_engine(make_config(models, prompt_file, tmp_path, loss_normalization=mode))
        samples = shortened(engine, prompts[:4], (1, 2, 5, 6))
        assert [len(i.target_ids) for i in samples] == [1, 2, 5, 6]
        found[mode], _ = loss_and_gradient(engine, samples)
        kinds = {"code": "reverse_kl", "agentic": "reverse_kl"}
        expected = expected_loss(models, tokenizer, samples, kind_of=kinds, weights=[0.75, 0.25], normalization=mode)
        assert found[mode] == pytest.approx(expected, rel=1e-4)
    assert found["token"] != pytest.approx(found["sequence"], rel=1e-2)


def test_divergence_by_task_in_one_batch(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    kinds = {"code": "reverse_kl", "agentic": "jsd"}
    engine = make_engine(
        make_config(models, prompt_file, tmp_path, divergence={"agentic": "jsd", "default": "reverse_kl"})
    )
    samples = make_samples(engine, prompts[:4])
    assert [i.prompt.key for i in samples] == ["code", "agentic", "code", "agentic"]
    loss, gradient = loss_and_gradient(engine, samples)
    expected = expected_loss(models, tokenizer, samples, kind_of=kinds, weights=[0.75, 0.25], normalization="token")
    assert loss == pytest.approx(expected, rel=1e-4)
    # The gradient of the batch is the sum of the gradients of its tasks, each under its own divergence.
    parts = [loss_and_gradient(engine, [i for i in samples if i.prompt.key == key])[1] for key in kinds]
    assert_same_gradients(gradient, {n: parts[0][n] + parts[1][n] for n in gradient})
    for wrong in ("reverse_kl", "jsd"):
        uniform = dict.fromkeys(kinds, wrong)
        other = expected_loss(models, tokenizer, samples, kind_of=uniform, weights=[0.75, 0.25], normalization="token")
        assert loss != pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("mixture", [False, True])
def test_parameters_of_two_divergences_and_the_mixture_in_one_batch(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path, mixture: bool
) -> None:
    """Each task gets its own parameter; "mixture" is one divergence to the weighted teachers."""
    config = make_config(
        models, prompt_file, tmp_path, divergence={"agentic": "jsd", "code": "skew_kl"}, jsd_beta=0.3,
        skew_alpha=0.2, teacher_reduction="mixture" if mixture else "sum",
    )  # fmt: skip
    engine = make_engine(config)
    samples = make_samples(engine, prompts[:2])
    loss, _ = loss_and_gradient(engine, samples)
    vocab = vocabulary_size(tokenizer)
    total, count = 0.0, 0
    for sample in samples:
        rollout, answer = sample, sample.target_ids
        ids, places = rollout.token_ids.tolist(), rollout.target_positions
        student = full_logprobs(models["student"], ids, places, vocab)
        teachers = [full_logprobs(models[name], ids, places, vocab) for name in ("big", "small")]
        weights = [0.75, 0.25]
        if mixture:
            teachers = [sum(w * t.exp() for w, t in zip(weights, teachers, strict=True)).log()]
            weights = [1.0]
        kind, share = ("jsd", 0.3) if rollout.prompt.key == "agentic" else ("skew_kl", 0.2)
        total += sum(
            w * divergence(kind, student, t, share).sum().item() for w, t in zip(weights, teachers, strict=True)
        )
        count += len(answer)
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_divergence_temperature_divides_both_sides_and_not_the_sampling(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, divergence_temperature=2.0))
    samples = make_samples(engine, prompts[:3])
    plain = make_samples(make_engine(make_config(models, prompt_file, tmp_path)), prompts[:3])
    assert [i.target_ids.tolist() for i in samples] == [i.target_ids.tolist() for i in plain]
    loss, _ = loss_and_gradient(engine, samples)
    expected = expected_loss(
        models, tokenizer, samples, kind_of=dict.fromkeys(("code", "agentic"), "reverse_kl"), weights=[0.75, 0.25],
        normalization="token", temperature=2.0,
    )  # fmt: skip
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["mt_opd", "mt_seqkd"])
def test_loss_and_gradient_do_not_depend_on_micro_batches(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path, method: str
) -> None:
    config = make_config(
        models, prompt_file, tmp_path, method=method, divergence={"code": "jsd", "default": "forward_kl"}
    )
    engine = make_engine(config)
    samples = make_samples(engine, prompts[:5])
    loss, gradient = loss_and_gradient(engine, samples)
    longest = max(len(i.token_ids) for i in samples)
    for max_tokens in (1, longest + 20, 2 * longest + 5):
        engine.config = dataclasses.replace(config, max_tokens_per_batch=max_tokens)
        cut_loss, cut = loss_and_gradient(engine, samples)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(cut, gradient)


def test_gradient_checkpointing_changes_no_gradient(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    found = []
    for on in (False, True):
        engine = make_engine(make_config(models, prompt_file, tmp_path, gradient_checkpointing=on))
        assert engine.student.model.is_gradient_checkpointing == on
        found.append(loss_and_gradient(engine, make_samples(engine, prompts[:2]))[1])
    assert_same_gradients(found[1], found[0])


def test_gradient_equals_that_of_plain_torch(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    """Through the tied head and the whole trunk."""
    from transformers import AutoModelForCausalLM

    engine = make_engine(make_config(models, prompt_file, tmp_path, divergence="jsd"))
    samples = make_samples(engine, prompts[:3])
    _, gradient = loss_and_gradient(engine, samples)
    vocab = vocabulary_size(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(models["student"]).double()
    count = sum(len(i.target_ids) for i in samples)
    for sample in samples:
        ids, at = sample.token_ids, torch.from_numpy(sample.target_positions)
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, at - 1, :vocab]
        for weight, name in ((0.75, "big"), (0.25, "small")):
            teacher = full_logprobs(models[name], ids.tolist(), at.numpy(), vocab)
            (weight * divergence("jsd", logits.log_softmax(-1), teacher).sum() / count).backward(retain_graph=True)
    expected = {n: p.grad.float() for n, p in model.named_parameters()}
    assert_same_gradients(gradient, expected, rtol=2e-4)


def test_teachers_are_chosen_by_the_key_of_the_prompt(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    teachers = [{"model": models["big"], "key": ["code"]}, {"model": models["small"], "key": ["agentic"]}]
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="opd", teachers=teachers))
    samples = make_samples(engine, prompts[:4])
    assert [i.teachers for i in samples] == [("big",), ("small",), ("big",), ("small",)]
    loss, _ = loss_and_gradient(engine, samples)
    parts = [
        expected_loss(
            models, tokenizer, [sample], kind_of={sample.prompt.key: "reverse_kl"}, normalization="token",
            weights=[1.0, 0.0] if sample.prompt.key == "code" else [0.0, 1.0],
        )
        for sample in samples
    ]  # fmt: skip
    lengths = [len(i.target_ids) for i in samples]
    assert loss == pytest.approx(np.average(parts, weights=lengths), rel=1e-4)


# ------------------------------------------------------------------------------------ MAD-OPD

SAID = {
    "big": ["first of big <<CONFIDENCE=20>>", "second of big <<CONFIDENCE=90>>"],
    "small": ["first of small", "second of small <<CONFIDENCE=30>>"],
}


def script_the_debate(engine: Any) -> None:
    for teacher in engine.teachers:
        said = iter(SAID[teacher.name])

        async def generate(requests: Sequence[Request], params: SamplingParams, said: Any = said) -> list[Completion]:
            text = next(said)
            return [Completion(np.array([5]), np.zeros(1), "stop", text) for _ in requests]

        teacher.generate = generate


def test_loss_of_mad_opd_equals_plain_torch_under_the_transcript(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    config = make_config(
        models, prompt_file, tmp_path, method="mad_opd", loss_normalization="sequence",
        divergence={"code": "reverse_kl", "agentic": "jsd"}, debate={"tau": 0.5},
    )  # fmt: skip
    engine = make_engine(config)
    script_the_debate(engine)
    samples = make_samples(engine, prompts[:4])
    transcript = (
        "[Debate Start]\n"
        "[Expert A Round 1]: first of big <<CONFIDENCE=20>>\n[Expert B Round 1]: first of small\n"
        "[Expert A Round 2]: second of big <<CONFIDENCE=90>>\n[Expert B Round 2]: second of small <<CONFIDENCE=30>>"
        "\n[Debate End]"
    )
    raw = np.exp(np.array([0.9, 0.3]) / 0.5)
    weights = (raw / raw.sum()).tolist()
    loss, _ = loss_and_gradient(engine, samples)
    settings: dict[str, Any] = {
        "kind_of": {"code": "reverse_kl", "agentic": "jsd"}, "weights": weights, "normalization": "sequence",
    }  # fmt: skip
    expected = expected_loss(
        models, tokenizer, samples, **settings,
        question_of=lambda p, k: f"S {question(p)} | {'AB'[k]} | {transcript}",
    )  # fmt: skip
    assert loss == pytest.approx(expected, rel=1e-4)
    blind = expected_loss(models, tokenizer, samples, **settings)
    assert loss != pytest.approx(blind, rel=1e-3)


def test_mad_opd_without_transcript_uses_only_the_weights(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    config = make_config(models, prompt_file, tmp_path, method="mad_opd", debate={"use_transcript": False, "rounds": 2})
    engine = make_engine(config)
    script_the_debate(engine)
    samples = make_samples(engine, prompts[:3])
    raw = np.exp([0.9, 0.3])
    expected = expected_loss(
        models, tokenizer, samples, kind_of=dict.fromkeys(("code", "agentic"), "reverse_kl"), normalization="token",
        weights=(raw / raw.sum()).tolist(),
    )  # fmt: skip
    loss, _ = loss_and_gradient(engine, samples)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_student_never_reads_the_transcript(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mad_opd"))
    seen: list[list[int]] = []
    engine.student.trunk.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    asyncio.run(engine.step(prompts[:4]))
    read = [tokenizer.decode(ids) for ids in seen]
    assert any(question(prompts[0]) in text for text in read)
    assert not any("Debate" in text or "Expert" in text for text in read)


# --------------------------------------------------------------------------- memory and the head


class Refused(RuntimeError):
    pass


@pytest.mark.parametrize("method", ["opd", "mt_opd", "mad_opd", "mt_seqkd"])
def test_no_head_is_called_on_the_training_path(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path, method: str
) -> None:
    teachers = [{"model": models["big"]}] if method == "opd" else None
    changes = {} if teachers is None else {"teachers": teachers}
    engine = make_engine(make_config(models, prompt_file, tmp_path, method=method, **changes))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Refused

    async def step() -> None:
        batch = await engine.prepare(prompts[:4], 0)
        for model in [engine.student.model, *(t.backbone.model for t in engine.teachers)]:
            model.forward = refuse
            model.get_output_embeddings().forward = refuse
        with pytest.raises(Refused):
            engine.student.model(input_ids=torch.ones(1, 1, dtype=torch.long))
        await engine.score(batch)
        engine.measure(batch)
        engine.weigh(batch)
        before = engine.student.model.get_input_embeddings().weight.clone()
        assert engine.update(batch).metrics["loss"] > 0
        assert not torch.equal(before, engine.student.model.get_input_embeddings().weight)

    asyncio.run(step())


class Watch(TorchDispatchMode):
    """Notes the largest number of rows of any tensor with an axis as wide as a vocabulary."""

    def __init__(self, widths: range) -> None:
        super().__init__()
        self.widths = widths
        self.most_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                for width in tensor.shape:
                    if width in self.widths:
                        self.most_rows = max(self.most_rows, tensor.numel() // width)
        return result


@pytest.mark.parametrize("method", ["mt_opd", "mt_seqkd"])
def test_nothing_of_the_size_of_tokens_times_vocabulary_is_made(
    models: Models, tokenizer: Any, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path, method: str
) -> None:
    vocab = vocabulary_size(tokenizer)
    config = make_config(
        models, prompt_file, tmp_path, method=method, max_completion_length=90, max_steps=1, loss_impl="torch"
    )
    found = {}
    for budget in (None, 1 << 16):
        engine = make_engine(dataclasses.replace(config, workspace_bytes=budget))
        samples = make_samples(engine, prompts)
        tokens = sum(len(i.target_ids) for i in samples)
        assert tokens > 600  # far more than any hidden size here
        with Watch(range(vocab, vocab + 20)) as watch:
            loss, gradient = loss_and_gradient(engine, samples)
        found[budget] = (watch, loss, gradient)
    roomy, tight = found[None][0], found[1 << 16][0]
    assert roomy.most_rows >= tokens  # the watch does see logits where the budget allows them
    assert tight.most_rows < tokens // 3
    assert found[1 << 16][1] == pytest.approx(found[None][1], rel=1e-5)
    assert_same_gradients(found[1 << 16][2], found[None][2])


# ----------------------------------------------------------------------------------- contracts


def test_a_context_with_other_tokens_than_the_students_is_refused(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path))
    rollouts = asyncio.run(engine.rollout(prompts[:1], 0)).samples
    context = TeacherContext.replace_prompt(rollouts[0], "big", [7, 8, 9])
    assert context.token_ids[:3].tolist() == [7, 8, 9]
    changed = dataclasses.replace(context, token_ids=np.concatenate([context.token_ids[:-1], [3]]))
    with pytest.raises(ValueError, match="does not hold the student's exact token"):
        changed.check(rollouts[0])


def test_contexts_beyond_a_teachers_window_are_dropped_and_counted(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path))
    engine.teachers[1].backbone.model.config.max_position_embeddings = 10
    before = {n: p.clone() for n, p in engine.student.model.named_parameters()}
    metrics = asyncio.run(engine.step(prompts[:4])).metrics
    assert metrics["dropped/teacher_window/small"] == 4
    assert metrics["skipped_steps"] == 1
    assert engine.version == 0
    assert all(torch.equal(p, before[n]) for n, p in engine.student.model.named_parameters())


def test_a_step_reports_what_it_did(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mad_opd", num_generations=2))
    result = asyncio.run(engine.step(prompts[:4]))
    metrics = result.metrics
    assert len(result.samples) == 8
    assert metrics["completions/kept"] == 8
    assert metrics["debate/generated"] == 4  # one debate per state, however many samples
    assert metrics["policy_version"] == 1 == engine.sampler.policy_version
    assert metrics["sampling/logprob_difference"] < 1e-4
    assert metrics["teacher_weight/big"] == pytest.approx(0.5)
    assert metrics["debate/parse_failures"] == 8  # two experts in four debates
    assert len(result.records) == 4
    for name in ("loss", "grad_norm", "learning_rate", "teacher_kl/big", "teacher_kl/small", "gap/mean", "gap/p95",
                 "timing/rollout", "timing/debate", "timing/score", "timing/update", "timing/sync",
                 "perf/tokens_per_second", "completions/mean_length", "completions/clipped_ratio"):  # fmt: skip
        assert np.isfinite(metrics[name]), name
    groups = [r.group for r in result.samples]
    assert groups == [str(i // 2) for i in range(8)]
    assert len({tuple(r.target_ids) for r in result.samples}) > 4  # two samples of a prompt are two samples


def test_a_prompt_that_comes_again_gets_new_samples_and_a_resumed_step_the_same(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    def sampled(engine: Any) -> list[list[int]]:
        return [r.target_ids.tolist() for r in asyncio.run(engine.step(prompts[:3])).samples]

    config = make_config(models, prompt_file, tmp_path, learning_rate=0.0)
    engine = make_engine(config)
    first, second = sampled(engine), sampled(engine)
    assert first != second
    resumed = make_engine(config)
    resumed.version = resumed.sampler.policy_version = 1
    assert sampled(resumed) == second
    assert sampled(make_engine(dataclasses.replace(config, seed=1))) != first


def test_bfloat16_autocast_stays_close_to_float32(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    found, samples = {}, []
    for bf16 in (False, True):
        engine = make_engine(make_config(models, prompt_file, tmp_path, bf16=bf16, divergence="forward_kl"))
        samples = samples or make_samples(engine, prompts[:3])
        found[bf16] = loss_and_gradient(engine, samples)
        assert {g.dtype for g in found[bf16][1].values()} == {torch.float32}
    assert found[True][0] != found[False][0]
    assert found[True][0] == pytest.approx(found[False][0], rel=0.02)
    flat = {k: torch.cat([g.flatten() for g in gradients.values()]) for k, (_, gradients) in found.items()}
    assert torch.cosine_similarity(flat[True], flat[False], dim=0) > 0.99


def test_parameters_that_cannot_be_trained_are_refused(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"dtype='float16' gives .* set dtype: float32"):
        make_engine(make_config(models, prompt_file, tmp_path, dtype="float16"))
    with caplog.at_level("WARNING"):
        make_engine(make_config(models, prompt_file, tmp_path, dtype="bfloat16"))
    assert "bfloat16" in caplog.text


def test_a_student_stored_in_float16_is_trained_in_float32(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float16).save_pretrained(folder)
    load_tokenizer(models["student"]).save_pretrained(folder)
    with caplog.at_level("INFO"):
        engine = make_engine(make_config({**models, "student": str(folder)}, prompt_file, tmp_path))
    assert {p.dtype for p in engine.student.model.parameters()} == {torch.float32}
    assert "half is stored in float16" in caplog.text
    del (settings := json.loads((folder / "config.json").read_text()))["dtype"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"dtype='auto' gives .* set dtype: float32"):
        make_engine(make_config({**models, "student": str(folder)}, prompt_file, tmp_path))


def test_norms_and_biases_are_not_decayed(models: Models, prompt_file: str, tmp_path: Path) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in engine.optimizer.param_groups for p in group["params"]}
    parameters = dict(engine.student.model.named_parameters())
    assert len(decay) == len(parameters)
    for name, parameter in parameters.items():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.5), name


def test_biases_of_experts_and_norms_of_heads_are_matrices_and_not_decayed(
    models: Models, prompt_file: str, tmp_path: Path
) -> None:
    """gpt-oss has one bias for each expert in a matrix, Cohere one norm for each head."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 32}  # fmt: skip
    config = make_config(models, prompt_file, tmp_path, weight_decay=0.5)
    for model, kept in (
        (GptOssForCausalLM(GptOssConfig(**small, head_dim=8, num_local_experts=4)), ("bias", "sinks")),
        (CohereForCausalLM(CohereConfig(**small, use_qk_norm=True, pad_token_id=0)), ("q_norm", "k_norm")),
    ):
        optimizer = build_optimizer(config, model)
        decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        names = dict(model.named_parameters())
        assert any(p.dim() > 1 for name, p in names.items() if kept[0] in name)
        for name, parameter in names.items():
            assert decay[parameter] == (0.0 if "norm" in name or any(part in name for part in kept) else 0.5), name
