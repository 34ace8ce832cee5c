"""Runs with pictures: frozen towers, adapters, resumed runs, text in place of pictures, debates."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import make_config, make_engine
from safetensors.torch import load_file
from test_vision_step import expected, plain_logprobs, read_whole, vision_config, whole_step

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.data.files import DataError
from opdengine.data.prompts import load_prompts
from opdengine.errors import ConfigError
from opdengine.methods.debate.prompts import debate_prompts
from opdengine.models.backbone import load_model
from opdengine.models.chat import as_read, encode_chat, load_tokenizer
from opdengine.models.vision_tower import tower
from opdengine.training.run import train
from opdengine.types import images_of

KIND = "qwen3_vl"


def trained(engine: Any) -> set[str]:
    return {name for name, p in engine.student.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3", "gemma3"])
def test_the_tower_is_frozen_unless_asked(seeing: Any, picture_rows: str, tmp_path: Path, kind: str) -> None:
    """Its weights have no gradient and stay; those of the language model move."""
    config = vision_config(seeing(kind), seeing(kind, 1), picture_rows, tmp_path, learning_rate=1e-2)
    engine = make_engine(config)
    before = {n: p.detach().clone() for n, p in engine.student.model.named_parameters()}
    asyncio.run(engine.step(load_prompts([picture_rows]).prompts))
    moved = {n for n, p in engine.student.model.named_parameters() if not torch.equal(p, before[n])}
    names = {f"{place}.{n}" for place, part in tower(engine.student.model) for n, _ in part.named_parameters()}
    assert names and not names & trained(engine) and moved <= trained(engine) == set(before) - names
    assert any("mlp" in name for name in moved)


def test_an_adapter_on_the_language_model(seeing: Any, picture_rows: str, tmp_path: Path) -> None:
    """All linear layers get one, but those of the frozen tower; the gradient is that of the merged model's factors."""
    config = vision_config(seeing(KIND), seeing(KIND, 1, 48), picture_rows, tmp_path, lora={"r": 2})
    torch.manual_seed(0)
    engine = make_engine(config)
    assert trained(engine) and all("language_model" in name for name in trained(engine))
    for name, parameter in engine.student.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    result, gradient = whole_step(engine, load_prompts([picture_rows]).prompts)
    kept = [s for s in result.samples if not s.drop]
    student, tokenizer = read_whole(config.model), load_tokenizer(config.model)
    factors = {n: p.detach().double() for n, p in engine.student.model.named_parameters() if "lora_" in n}
    weights = dict(student.named_parameters())
    names = {n: n.removeprefix("base_model.model.").replace(".lora_B.default", "") for n in factors if "lora_B" in n}
    with torch.no_grad():
        for left, name in names.items():
            weights[name] += 16.0 * factors[left] @ factors[left.replace("lora_B", "lora_A")]
    loss = expected(kept, student, read_whole(config.teachers[0].model), tokenizer, "reverse_kl")
    loss.backward()
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for left, name in names.items():
        whole = weights[name].grad
        found = gradient[left].double()
        wanted = 16.0 * whole @ factors[left.replace("lora_B", "lora_A")].T
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())

    wide = dataclasses.replace(config, freeze_vision_tower=False)
    assert any("visual" in name for name in trained(make_engine(wide)))


def test_a_run_is_continued_to_the_bit(seeing: Any, picture_rows: str, tmp_path: Path) -> None:
    """Its final model has its processor, and can be read, trained and evaluated by itself."""
    whole = vision_config(
        seeing(KIND), seeing(KIND, 1, 48), picture_rows, tmp_path / "whole", log_completions=True, save_steps=1,
        eval_data=[picture_rows], eval_steps=2, max_steps=2,
    )  # fmt: skip
    train(whole, progress=False)
    begun = dataclasses.replace(whole, output_dir=str(tmp_path / "begun"))
    train(begun, progress=False)
    for later in (tmp_path / "begun" / "checkpoints").glob("step_2"):
        for file in later.rglob("*"):
            if file.is_file():
                file.unlink()
    (tmp_path / "begun" / "final" / "model.safetensors").unlink()
    train(dataclasses.replace(begun, resume_from_checkpoint="latest"), progress=False)
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "begun"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    final = str(tmp_path / "whole" / "final")
    tokenizer, before = load_tokenizer(final), load_tokenizer(whole.model)
    messages = load_prompts([picture_rows]).prompts[1].messages
    assert encode_chat(tokenizer, messages) == encode_chat(before, messages)
    assert load_model(final, dtype="float32").config.model_type == KIND
    log = min((tmp_path / "whole" / "rollouts").glob("*.jsonl"))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    shown = [part for row in rows for m in row["prompt"] if isinstance(m["content"], list) for part in m["content"]]
    assert any(str(part.get("image")).startswith("<image ") for part in shown)


def test_a_student_that_sees_is_saved_with_its_processor_after_rows_of_text(seeing: Any, tmp_path: Path) -> None:
    """Whatever it was given: who loads the model next may show it pictures."""
    rows = tmp_path / "words.jsonl"
    rows.write_text(json.dumps({"prompt": "Say a word."}) + "\n")
    config = vision_config(seeing(KIND), seeing(KIND, 1), str(rows), tmp_path / "run", max_steps=1)
    train(config, progress=False)
    assert load_tokenizer(str(tmp_path / "run" / "final")).vision is not None


def in_words(images: str, prompt: Any) -> list[Any]:
    return [dict(m) for m in as_read(prompt.messages, images)]


@pytest.mark.parametrize("images", ["text", "omit"])
def test_a_teacher_of_text_judges_a_student_that_sees(
    seeing: Any, models: dict[str, str], picture_rows: str, tmp_path: Path, images: str
) -> None:
    """It reads a text in place of each picture, or the question alone, and then the student's own ids."""
    teachers = [{"model": models["small"], "images": images}]
    config = vision_config(seeing("gemma3"), models["small"], picture_rows, tmp_path, teachers=teachers)
    engine = make_engine(config)
    tokenizer, plain = load_tokenizer(config.model), load_tokenizer(models["small"])
    assert engine.vocab_size == len(plain) < len(tokenizer)
    result, _ = whole_step(engine, load_prompts([picture_rows]).prompts)
    assert len([s for s in result.samples if not s.drop]) == len(result.samples) == 4
    for sample in result.samples:
        (context,) = sample.contexts
        read = encode_chat(plain, in_words(images, sample.prompt))
        assert context.token_ids.tolist() == [*read, *sample.target_ids] and context.images == ()
        assert bool(sample.images) == bool(images_of(sample.prompt.messages))
    text = plain.decode(result.samples[1].contexts[0].token_ids)
    assert ("wide\n or \nhigh\n?" in text) == (images == "text")

    student, teacher = read_whole(config.model), read_plain(models["small"])
    loss = torch.zeros((), dtype=torch.float64)
    for sample in result.samples:
        answer = sample.target_ids.tolist()
        p = plain_logprobs(student, tokenizer, sample.prompt.messages, answer).exp()[:, : len(plain)]
        p = (p / p.sum(-1, keepdim=True)).log()
        ids = sample.contexts[0].token_ids.tolist()
        q = teacher(torch.tensor([ids])).logits[0, -len(answer) - 1 : -1, : len(plain)].log_softmax(-1)
        loss = loss + (p.exp() * (p - q)).sum() / sum(len(s.target_ids) for s in result.samples)
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def read_plain(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).double().eval()


def test_a_teacher_that_sees_judges_a_student_of_text(
    seeing: Any, models: dict[str, str], picture_rows: str, tmp_path: Path
) -> None:
    config = vision_config(models["student"], seeing(KIND, 1, 48), picture_rows, tmp_path, images="omit")
    engine = make_engine(config)
    result, _ = whole_step(engine, load_prompts([picture_rows]).prompts)
    assert all(not s.images for s in result.samples)
    assert [len(s.contexts[0].images) for s in result.samples] == [1, 2, 0, 1]


def test_settings_that_cannot_be_are_refused(
    seeing: Any, models: dict[str, str], picture_rows: str, tmp_path: Path
) -> None:
    """Before any model is loaded: who is given no pictures, and who is asked over a network."""
    config = vision_config(models["student"], models["big"], picture_rows, tmp_path / "a")
    with pytest.raises(DataError, match=r"the student cannot render a chat with a picture.*'text'.*'omit'"):
        train(config, progress=False)
    served = {"model": "x", "base_url": "http://host:1/v1", "tokenizer": models["big"]}
    config = vision_config(seeing(KIND), models["big"], picture_rows, tmp_path / "b", teachers=[served])
    with pytest.raises(ConfigError, match="is asked by base_url or writer_base_url"):
        train(config, progress=False)
    without = Path(picture_rows).with_name("without.jsonl")
    without.write_text(json.dumps({"prompt": "What?", "images": "0.png"}))
    config = vision_config(models["student"], models["big"], str(without), tmp_path / "c", images="text")
    with pytest.raises(DataError, match="without a text in its place"):
        train(config, progress=False)
    with pytest.raises(ConfigError, match="images='words' is not possible"):
        from_mapping(TrainConfig, {"model": "x", "output_dir": "y", "images": "words"})


def test_a_text_with_the_mark_of_a_picture_is_refused(seeing: Any) -> None:
    from vision_helpers import chat, make_picture

    tokenizer = load_tokenizer(seeing(KIND))
    with pytest.raises(ValueError, match="which stands for a picture here"):
        encode_chat(tokenizer, chat("<|image_pad|>", make_picture(0)))
    with pytest.raises(ValueError, match="processor cannot read the pictures"):
        encode_chat(tokenizer, chat(make_picture(0, 900, 4)))
    assert encode_chat(tokenizer, chat("<|image_pad|>")).images == ()


def test_experts_debate_about_a_picture(seeing: Any, models: dict[str, str], picture_rows: str, tmp_path: Path) -> None:
    """An expert that sees reads the picture where the task is told, one of text what stands in its place."""
    asked: dict[str, list[Any]] = {"sees": [], "reads": []}
    data = {
        "teachers": [
            {"model": seeing(KIND, 1, 48), "name": "sees"}, {"model": models["big"], "name": "reads", "images": "text"},
        ],
        "method": "mad_opd",
    }  # fmt: skip
    big = {"student": seeing(KIND), "big": models["big"], "small": models["small"]}
    config = make_config(big, picture_rows, tmp_path, **data)
    engine = make_engine(config)
    for teacher in engine.teachers:
        generate = teacher._generator.generate

        def spy(requests: Any, params: Any, name: str = teacher.name, generate: Any = generate) -> Any:
            asked[name] += requests
            return generate(requests, params)

        teacher._generator.generate = spy  # type: ignore[method-assign]
    result, _ = whole_step(engine, load_prompts([picture_rows]).prompts[:2])
    assert [len(s.contexts) for s in result.samples] == [2, 2]
    assert {len(r.images) for r in asked["sees"]} == {1, 2} and {len(r.images) for r in asked["reads"]} == {0}
    assert [tuple(len(c.images) for c in s.contexts) for s in result.samples] == [(1, 0), (2, 0)]
    words = engine.teachers[1].tokenizer.decode(asked["reads"][0].token_ids)
    assert "a square\nWhat is this?" in words


def test_a_picture_stands_in_the_task_of_a_debate() -> None:
    from vision_helpers import chat, make_picture

    family = debate_prompts({"first": "Q {task}!", "later": "{task} {transcript}", "score": "{transcript}: {task}"})
    picture = make_picture(0)
    messages = chat("one ", picture, " two")
    (message,) = family.score_messages(messages, 0, [["said"]])
    before, _, shown, _, after = message["content"]
    assert before["text"].endswith(": ") and "said" in before["text"] and shown["image"] == picture
    assert after["text"] == ""
    (message,) = family.first_messages(chat("words"), 0, False)
    assert message["content"] == "Q words!"
