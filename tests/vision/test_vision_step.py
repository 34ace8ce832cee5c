"""Steps on prompts with pictures, against the logits of transformers' own models in float64."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_gradients, divergence, make_config, make_engine
from vision_helpers import KINDS, chat, make_picture

from opdengine.data.prompts import load_prompts
from opdengine.models.backbone import Backbone, load_model
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.models.pictures import open_picture
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.scoring import Measurer
from opdengine.types import Encoded, Request, Sample, SamplingParams, images_in, images_of


def read_whole(path: str) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path).double().eval()


def plain_logprobs(model: Any, tokenizer: Any, messages: Sequence[Any], answer: Sequence[int]) -> torch.Tensor:
    """float64 [T, V]: what the whole model says to an answer; only transformers counts positions here."""
    chat = [
        {**m, "content": [{k: v for k, v in part.items() if k != "image"} for part in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]
    if "is string" not in tokenizer.chat_template:
        chat = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
            for m in chat
        ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    pictures = [open_picture(image) for image in images_of(messages)]
    processor = tokenizer.vision.processor
    inputs = dict(processor(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(answer)])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(answer)))
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    logits = model(**inputs, use_cache=False).logits[0, -len(answer) - 1 : -1]
    return logits[:, : len(tokenizer)].log_softmax(-1)


def whole_step(engine: Any, prompts: Sequence[Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    gradient: dict[str, torch.Tensor] = {}

    def note(loss: float, norm: float) -> dict[str, float]:
        gradient.update({n: p.grad.clone() for n, p in engine.student.model.named_parameters() if p.grad is not None})
        return {"loss": loss}

    engine._optimizer_step = note
    return asyncio.run(engine.step(prompts)), gradient


def vision_config(student: str, teacher: str, data: str, folder: Path, **changes: Any) -> Any:
    """One teacher and no paper's defaults."""
    models = {"student": student, "big": teacher, "small": teacher}
    return make_config(models, data, folder, **{"teachers": [{"model": teacher}], "method": "opd", **changes})


def expected(samples: Sequence[Sample], student: Any, teacher: Any, tokenizer: Any, kind: str) -> torch.Tensor:
    """The loss of a step of OPD with the mean over tokens, from whole models."""
    every = sum(len(s.target_ids) for s in samples)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        answer = sample.target_ids.tolist()
        p = plain_logprobs(student, tokenizer, sample.prompt.messages, answer)
        with torch.no_grad():
            q = plain_logprobs(teacher, tokenizer, sample.prompt.messages, answer)
        loss = loss + divergence(kind, p, q).sum() / every
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_step(seeing: Any, picture_rows: str, tmp_path: Path, kind: str) -> None:
    """Pictures of several sizes, two in a prompt, none in another; every weight is trained, the tower's too."""
    config = vision_config(
        seeing(kind), seeing(kind, 1, 48), picture_rows, tmp_path,
        num_generations=2, freeze_vision_tower=False, gradient_checkpointing=kind == "qwen3_vl",
    )  # fmt: skip
    tokenizer = load_tokenizer(config.model)
    engine = make_engine(config)
    engine.sampler.stop_ids = tuple(range(0, 290, 4))  # completions of several lengths
    result, gradient = whole_step(engine, load_prompts([picture_rows]).prompts)
    kept = [s for s in result.samples if not s.drop]
    assert len(kept) >= 7 and {len(s.images) for s in kept} == {0, 1, 2}
    assert {s.drop for s in result.samples} <= {"", "image_token_sampled"}

    student, teacher = read_whole(config.model), read_whole(config.teachers[0].model)
    loss = expected(kept, student, teacher, tokenizer, "reverse_kl")
    loss.backward()
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = {n: p.grad.float() for n, p in student.named_parameters() if p.grad is not None}
    assert any("vis" in name for name in wanted)
    assert_same_gradients(gradient, {n: wanted[n] for n in gradient}, rtol=1e-5)
    assert not {n for n in set(wanted) - set(gradient) if wanted[n].abs().max() > 0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_a_sequence_gets_alone(seeing: Any, kind: str) -> None:
    """Packed or padded with others of other sizes, each sequence has its own logits."""
    path = seeing(kind)
    tokenizer = load_tokenizer(path)
    student = Backbone(load_model(path, dtype="float32"), vision=tokenizer.vision)
    assert student.image_layout != "alone"
    words = chat("a", make_picture(0, 90, 50), "b"), chat(make_picture(1, 30, 70)), chat("no picture")
    two = chat(make_picture(2, 60, 60), "then", make_picture(0, 90, 50), "?")
    chats = [*words, two, *words]
    encoded = [encode_chat(tokenizer, messages) for messages in chats]
    answers = [np.arange(3 + 2 * i) + 5 for i in range(len(chats))]
    ids = [np.array([*prompt, *answer]) for prompt, answer in zip(encoded, answers, strict=True)]
    places = [np.arange(len(p), len(i)) for p, i in zip(encoded, ids, strict=True)]
    batches = student.pack(ids, 4096, [e.images for e in encoded])
    assert len(batches) == 2
    found = student.score(ids, places, [e.images for e in encoded])
    whole = read_whole(path)
    with torch.no_grad():
        for messages, answer, states in zip(chats, answers, found, strict=True):
            p = student.head.logits(states)[:, : len(tokenizer)].double().log_softmax(-1)
            torch.testing.assert_close(p, plain_logprobs(whole, tokenizer, messages, answer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_says_what_the_trainer_says(seeing: Any, kind: str) -> None:
    """Log-probs of samples in one batch of chats with pictures of several sizes and chats without."""
    path = seeing(kind)
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype="float32")
    student, sampler = Backbone(model, vision=tokenizer.vision), TransformersSampler(model, tokenizer)
    chats = [chat(make_picture(0, 90, 50), "b"), chat("word"), chat("x", make_picture(1, 30, 70), make_picture(2))]
    requests = [Request(str(i), encode_chat(tokenizer, messages), seed=i) for i, messages in enumerate(chats)]
    completions = sampler.generate(requests, SamplingParams(max_tokens=7, n=2))
    alone = sampler.generate(requests[2:], SamplingParams(max_tokens=7, n=2))
    assert [c.token_ids.tolist() for c in alone[0]] == [c.token_ids.tolist() for c in completions[2]]
    compared = 0
    for request, samples in zip(requests, completions, strict=True):
        for completion in samples:
            ids = np.array([*request.token_ids, *completion.token_ids])
            if not tokenizer.vision.matches(ids, request.images):
                continue
            (states,) = student.score([ids], [np.arange(len(request.token_ids), len(ids))], [request.images])
            p = student.head.logits(states)[:, : len(tokenizer)].log_softmax(-1)
            told = p[torch.arange(len(states)), torch.from_numpy(completion.token_ids)]
            np.testing.assert_allclose(completion.logprobs, told.detach().numpy(), atol=2e-4)
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_of_one_picture_is_not_taken_for_another(seeing: Any, kind: str) -> None:
    """Both have the same tokens, so a chat with a picture is read anew in every turn."""
    path = seeing(kind)
    tokenizer = load_tokenizer(path)
    sampler = TransformersSampler(load_model(path, dtype="float32"), tokenizer)
    params = SamplingParams(max_tokens=3)
    one, other = (encode_chat(tokenizer, chat(make_picture(n), "b")) for n in (0, 1))
    assert list(one) == list(other)
    with sampler.chats():
        ((said,),) = sampler.generate([Request("0", one)], params)
        assert sampler._chats is None or not sampler._chats.reads  # it would be of no use
        following = [*other, *said.token_ids.tolist(), *encode_chat(tokenizer, chat("word"))]
        request = Request("0", Encoded(following, images_in(other)))
        ((turn,),) = sampler.generate([request], params)
    ((alone,),) = sampler.generate([request], params)
    np.testing.assert_array_equal(turn.token_ids, alone.token_ids)
    np.testing.assert_allclose(turn.logprobs, alone.logprobs, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_that_comes_to_a_picture_is_read_whole(seeing: Any, kind: str) -> None:
    path = seeing(kind)
    tokenizer = load_tokenizer(path)
    sampler = TransformersSampler(load_model(path, dtype="float32"), tokenizer)
    params = SamplingParams(max_tokens=3)
    first, shown = encode_chat(tokenizer, chat("word")), encode_chat(tokenizer, chat(make_picture(0), "b"))
    with sampler.chats():
        ((said,),) = sampler.generate([Request("0", first)], params)
        request = Request("0", Encoded([*first, *said.token_ids.tolist(), *shown], images_in(shown)))
        ((turn,),) = sampler.generate([request], params)
    ((alone,),) = sampler.generate([request], params)
    np.testing.assert_array_equal(turn.token_ids, alone.token_ids)
    np.testing.assert_allclose(turn.logprobs, alone.logprobs, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_a_stale_rollout_is_read_with_its_pictures(seeing: Any, picture_rows: str, tmp_path: Path, kind: str) -> None:
    """Without teachers, too: the ratio of policies is that of whole models."""
    old = make_engine(vision_config(seeing(kind), seeing(kind, 1), picture_rows, tmp_path, temperature=1.0))
    new = make_engine(vision_config(seeing(kind, 1), seeing(kind), picture_rows, tmp_path, temperature=1.0))
    samples = list(asyncio.run(old.prepare(load_prompts([picture_rows]).prompts, 0)))
    samples = [s for s in samples if new.student.vision.matches(s.token_ids, s.images)]
    assert {len(s.images) for s in samples} > {1, 2}
    Measurer(new.student, {}, new.vocab_size, sampling=new.sampling_params(), version=1)(samples, {"policy_logratio"})
    student, tokenizer = read_whole(new.config.model), load_tokenizer(new.config.model)
    for sample in samples:
        answer = torch.tensor(sample.target_ids.tolist())
        with torch.no_grad():
            whole = plain_logprobs(student, tokenizer, sample.prompt.messages, answer.tolist())
        wanted = whole[torch.arange(len(answer)), answer].numpy() - sample.sampler_logprob
        np.testing.assert_allclose(sample.policy_logratio, wanted, atol=1e-4)
        assert np.abs(wanted).max() > 0.1
