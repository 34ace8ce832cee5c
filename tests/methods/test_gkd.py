"""GKD's mixture: who answers which prompt, what is given, and what it weighs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import ScriptedTeacher, full_logprobs, make_config, make_engine, make_samples
from self_taught_helpers import our_loss
from test_rewards import EVEN, built

from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.methods import build_method
from opdengine.methods.gkd import given_text
from opdengine.models.chat import load_tokenizer
from opdengine.models.reply import encode_prompt
from opdengine.training.run import train
from opdengine.types import Prompt

Models = dict[str, str]


@pytest.fixture(scope="module")
def recorded_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts with answers in two columns, of which one is a chat."""
    path = tmp_path_factory.mktemp("recorded") / "recorded.jsonl"
    rows = [
        {"id": f"p{i}", "prompt": f"What is {i} + {i}?", "completion": f" {2 * i}.",
         "said": [{"role": "assistant", "content": f" {2 * i}."}]}
        for i in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(models: Models, file: str, folder: Path, lmbda: float = 0.5, **changes: Any) -> Any:
    gkd = {"lmbda": lmbda, **changes.pop("gkd", {})}
    settings: dict[str, Any] = {"method": "opd", "teachers": [{"model": models["big"]}], "gkd": gkd}
    return make_config(models, file, folder, **{**settings, **changes})


# ------------------------------------------------------------------------------------------------ the draw


def test_a_draw_is_that_of_seed_step_and_prompt() -> None:
    """The share is lmbda; every step and seed draws anew, and a prompt with a lower share stays with the student."""

    def drawn(share: float, seed: int, number: int) -> list[bool]:
        method = built("opd", gkd={"lmbda": share}, seed=seed)
        return [method.is_written(Prompt(str(i), ()), number) for i in range(4000)]

    few, many = drawn(0.75, 0, 3), drawn(0.25, 0, 3)
    assert np.mean(few) == pytest.approx(0.25, abs=0.03) and np.mean(many) == pytest.approx(0.75, abs=0.03)
    assert all(b for a, b in zip(few, many, strict=True) if a)
    assert drawn(0.75, 0, 3) == few and drawn(0.75, 0, 4) != few and drawn(0.75, 1, 3) != few
    assert all(drawn(0.0, 0, 0))


@pytest.mark.parametrize("column", ["completion", "said"])
def test_a_step_mixes_answers_of_the_student_with_given_ones(
    models: Models, recorded_file: str, tmp_path: Path, column: str
) -> None:
    engine = make_engine(config_of(models, recorded_file, tmp_path, gkd={"completion_column": column}))
    prompts = load_prompts([recorded_file]).prompts
    batch = asyncio.run(engine.prepare(prompts, 5))
    given = {s.prompt.id for s in batch if s.info.get("given")}
    assert given == {p.id for p in prompts if engine.method.is_written(p, 5)} and 0 < len(given) < len(prompts)
    assert sorted(s.prompt.id for s in batch) == [p.id for p in prompts]
    assert len({s.id for s in batch}) == len(prompts)
    for sample in batch:
        assert sample.token_ids[: sample.target_positions[0]].tolist() == engine.encode(sample.prompt)
        if sample.prompt.id in given:
            number = int(sample.prompt.id[1:])
            assert sample.text == f" {2 * number}." and sample.sampler_logprob is None
            assert engine.tokenizer.decode(sample.target_ids) == f" {2 * number}.<|im_end|>"
        else:
            assert sample.sampler_logprob is not None
    asyncio.run(engine.score(batch))
    engine.measure(batch)
    engine.weigh(batch)
    assert batch.metrics["gkd/given"] == len(given)
    assert float(batch.metrics["gkd/on_policy"]) == pytest.approx(1 - len(given) / len(prompts))


def test_given_answers_have_the_ids_of_the_whole_chat(models: Models) -> None:
    """Up to the end of the turn, behind whatever chat; what is written out at the end of an answer stands once."""
    tokenizer = load_tokenizer(models["student"])
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"})
    prompt = Prompt("p", chat)
    for answer in ("It is 4.", " four\n", "x" * 40):
        whole = [*chat, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        ours = [*encode_prompt(tokenizer, {}, prompt), *encode_prompt(tokenizer, {}, prompt, answer)]
        assert ours == ids[: len(ours)] and tokenizer.decode(ids[len(ours) :]).strip() == ""
        assert encode_prompt(tokenizer, {}, prompt, answer + "<|im_end|>") == encode_prompt(
            tokenizer, {}, prompt, answer
        )


def test_an_answer_goes_on_in_the_thought_that_the_template_opens(models: Models) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = load_tokenizer(models["student"], chat_template=template)
    prompt = Prompt("p", ({"role": "user", "content": "Q"},))
    expected = encode_prompt(tokenizer, {}, prompt, "so</think>4")
    assert tokenizer.decode(expected) == "so</think>4<|im_end|>"
    assert encode_prompt(tokenizer, {}, prompt, "<think>\nso</think>4") == expected
    with pytest.raises(
        ValueError, match="begins every answer with <think>, and the recorded one of prompt 'p' does not"
    ):
        encode_prompt(tokenizer, {}, prompt, "4")


# ------------------------------------------------------------------------------------------------ the loss


def test_given_answers_have_a_supervised_term(models: Models, recorded_file: str, tmp_path: Path) -> None:
    """float64: sft_alpha times -log p of every given token, over all tokens of the step."""
    found = []
    for alpha in (0.0, 0.7):
        engine = make_engine(config_of(models, recorded_file, tmp_path, gkd={"sft_alpha": alpha}))
        samples = make_samples(engine, load_prompts([recorded_file]).prompts)
        found.append(our_loss(engine, samples))
    total, count = 0.0, sum(len(s.target_ids) for s in samples)
    for sample in samples:
        if sample.info.get("given"):
            rows = full_logprobs(models["student"], sample.token_ids, sample.target_positions, engine.vocab_size)
            total -= float(rows[np.arange(len(rows)), sample.target_ids].sum())
    assert found[1] - found[0] == pytest.approx(0.7 * total / count, rel=1e-4) and total > 0


def test_a_teacher_writes_the_given_answers(models: Models, recorded_file: str, tmp_path: Path) -> None:
    """Once for each prompt, which is judged like any other; what fails is left out and counted."""
    config = config_of(models, recorded_file, tmp_path, 0.0, gkd={"seq_kd": True, "sft_alpha": 1.0})
    engine = make_engine(config)
    prompts = load_prompts([recorded_file]).prompts[:3]
    asked = []
    generate = engine.teachers[0].generate

    async def counted(requests: Any, params: Any) -> Any:
        asked.extend(r.id for r in requests)
        return await generate(requests, params)

    engine.teachers[0].generate = counted  # type: ignore[method-assign]
    first, again = make_samples(engine, prompts), make_samples(engine, prompts)
    assert asked == [p.id for p in prompts]
    for one, other in zip(first, again, strict=True):
        assert one.target_ids.tolist() == other.target_ids.tolist() and one.contexts and (one.kl_weight == 1).all()
        assert (one.advantage == 1).all()
    method = build_method(config)
    method.teachers = [ScriptedTeacher("big", lambda call, request: "answer", window=4)]
    batch = asyncio.run(method.write(prompts, lambda p: [1]))
    assert batch.dropped == {"teacher_window/big": 3}


def test_a_run_mixes_and_says_how(models: Models, recorded_file: str, tmp_path: Path) -> None:
    result = train(config_of(models, recorded_file, tmp_path / "run", max_steps=3), progress=False)
    shares = [step["gkd/on_policy"] for step in result.history]
    assert len(set(shares)) > 1 and all(0 <= share <= 1 for share in shares)
    supervised = train(config_of(models, recorded_file, tmp_path / "all", 0.0, max_steps=2), progress=False)
    assert supervised.metrics["gkd/on_policy"] == 0 and supervised.metrics["loss"] > 0


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("opd", {"gkd": {"lmbda": 1.2}}, "gkd.lmbda=1.2 is not possible"),
        ("opd", {"gkd": {"sft_alpha": 0.5}}, "gkd.sft_alpha=0.5 is not possible; it has no effect with gkd.lmbda: 1"),
        ("opd", {"gkd": {"seq_kd": True}}, "gkd.seq_kd=True is not possible; it has no effect"),
        ("opd", {"gkd": {"lmbda": 0, "seq_kd": True, "completion_column": "x"}}, "with gkd.seq_kd teachers write"),
        ("opd", {"num_generations": 2}, "gkd.lmbda=0.5 is not possible with num_generations=2"),
        ("opd", {"distillation_is_clip": 2.0}, "with method 'opd' as it is set, .* without distillation_is_clip"),
        ("sage_opd", {"train_data": [], "environment": {"name": "search"}}, "with environment.name='search'"),
        ("mt_seqkd", {}, "gkd.lmbda=0.5 is not possible with method 'mt_seqkd'"),
        ("selectkd", {}, "gkd.lmbda=0.5 is not possible with method 'selectkd'"),
        ("relaxed_opd", {}, "gkd.lmbda=0.5 is not possible with method 'relaxed_opd'"),
        ("grpo", {"teachers": [], "num_generations": 1, "verifier": EVEN}, "num_generations|method 'grpo'"),
        ("camopd", {"teachers": [{"model": "t", "key": ["a"]}, {"model": "u", "key": ["b"]}],
                    "camopd": {"domain": ["a"]}, "advantage": {"kl_mode": "full_vocab"}}, "with method 'camopd'"),
    ],
)  # fmt: skip
def test_mixtures_that_mean_nothing_are_refused(method: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        built(method, **{"gkd": {"lmbda": 0.5}, **settings})


@pytest.mark.parametrize("method", ["opd", "mt_opd", "mad_opd", "gkd"])
def test_methods_with_a_divergence_mix(method: str) -> None:
    teachers = [{"model": "t"}, {"model": "u"}][: 1 if method in ("opd", "gkd") else 2]
    assert built(method, teachers, gkd={"lmbda": 0.5}).mixes
    assert not built(method, teachers, gkd={"lmbda": 1.0}).mixes


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "has no answer in the column 'completion', which gkd.lmbda=0.5 gives the student"),
        ({"completion": " "}, "has no answer in the column 'completion'"),
        ({"completion": 4}, ": the column 'completion' holds neither text nor one message of the assistant"),
        ({"completion": [{"role": "user", "content": "4"}]}, ": the column 'completion' holds neither"),
    ],
)
def test_rows_without_an_answer_load_no_model(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("opdengine.training.run.build_engine", lambda *_: pytest.fail("a model was loaded"))
    file = tmp_path / "d.jsonl"
    rows = [{"id": "y", "prompt": "Q", "completion": "4"}, {"id": "x", "prompt": "Q", **row}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=rf"1 of 2 prompts: prompt 'x' \({file}, row 2\).*{words}"):
        train(config_of(models, str(file), tmp_path / "run"), progress=False)


def test_answers_that_are_too_long_are_left_out_and_counted(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"id": str(i), "prompt": "Q", "completion": "4" * (1 + 30 * (i == 2))} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    method = build_method(config := config_of(models, str(file), tmp_path))
    tokenizer = load_tokenizer(config.model)
    fitting = method.fit(load_prompts([str(file)]), lambda *given: encode_prompt(tokenizer, {}, *given))
    assert [p.id for p in fitting.prompts] == ["0", "1", "3"] and fitting.dropped == {"too_long": 1}


def test_given_texts() -> None:
    said = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert given_text("a") == "a" and given_text(None) == "" and given_text([said]) == given_text(said) == "ab"
    for bad in (4, [], ["a"], [said, said], [{**said, "tool_calls": [{}]}]):
        with pytest.raises(ValueError, match="neither text nor one message"):
            given_text(bad)
    for field in ("reasoning_content", "reasoning", "thinking"):
        with pytest.raises(ValueError, match=rf"a thought beside the words \('{field}'\).*write it before them"):
            given_text([{**said, field: "a + b"}])
        assert given_text({**said, field: None}) == "ab"
