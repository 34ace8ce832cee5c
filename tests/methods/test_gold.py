"""Teachers with another tokenizer: TRL's GOLD and ULD on the same tokens, float64 gradients, and what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_gradients, loss_and_gradient, make_config, make_engine
from tokenizers_of_tests import byte_level, sentencepiece, word_piece
from transformers import AutoModelForCausalLM

from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.loss.gold import divergence
from opdengine.methods import build_method
from opdengine.models.chat import encode_answer
from opdengine.teachers.served_model import Served
from opdengine.training.run import train
from opdengine.types import Batch, Completion, Sample, Turn

sys.path.append(str(Path(__file__).parents[1] / "teachers"))
from remote_helpers import answering
from teacher_helpers import serve

gold = pytest.importorskip("trl.experimental.gold.gold_trainer")

Models = dict[str, str]
SAID = ["the answer is 42", "naive fox, of  course it is two", "x\ny \U0001f642 forty", "0 1 2 3 one"]


@pytest.fixture(scope="module")
def other(models: Models, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The student, and teachers with other tokenizers."""
    root = tmp_path_factory.mktemp("other")
    made = dict(models)
    kinds = {"bytes": byte_level(end="<|im_end|>"), "pieces": sentencepiece(), "lower": byte_level(lower=True)}
    for seed, (name, tokenizer) in enumerate(kinds.items(), start=5):
        made[name] = tiny.make_model(root / name, tokenizer, seed=seed, hidden=48, tied=False)
    return made


def config_of(other: Models, prompt_file: str, folder: Path, teacher: str = "bytes", **changes: Any) -> Any:
    settings = {
        "method": "gold",
        "teachers": [{"model": other[teacher], "tokenizer_alignment": "spans"}],
        "advantage": {"kl_mode": "full_vocab"},
    }
    return make_config(other, prompt_file, folder, **{**settings, **changes})


def weighed(engine: Any, prompts: Any, texts: list[str] = SAID, ended: bool = False) -> list[Sample]:
    """Samples of a step in which the student said these texts."""
    samples = []
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=False)):
        ids = engine.tokenizer.encode(text, add_special_tokens=False)
        ids += [engine.tokenizer.eos_token_id] * ended
        answer = Turn("assistant", np.array(ids), trains=True)
        turns = (Turn.of_prompt(engine.encode(prompt)), answer)
        samples.append(Sample(str(i), prompt, turns, group=str(i), text=text))

    async def run() -> list[Sample]:
        batch = Batch(0, samples)
        await engine.annotate(batch)
        await engine.score(batch)
        engine.measure(batch)
        engine.weigh(batch)
        return list(batch)

    return asyncio.run(run())


def logits_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.from_numpy(ids)[None]).logits
    return found


def trl_loss(samples: list[Sample], engine: Any, student: Any, teacher: Any, **arguments: Any) -> torch.Tensor:
    """The mean over rollouts of TRL's own loss, each times spans over tokens: ours is a mean over tokens."""
    settings = {
        "uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0, "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0, "uld_skip_student_eos": False, "uld_skip_teacher_eos": False,
        "use_extended_uld": True, "uld_token_merge_strategy": "bayesian", **arguments,
    }  # fmt: skip
    alignment = engine.teachers[0].alignment
    loss_of = gold.ULDLoss(SimpleNamespace(**settings), engine.tokenizer, engine.teachers[0].tokenizer)
    losses = []
    for sample in samples:
        context = sample.contexts[0]
        sides = []
        for ids, targets, values in (
            (sample.token_ids, sample.target_positions, alignment.own.values),
            (context.token_ids, context.target_positions, alignment.theirs.values),
        ):
            labels = np.full(len(ids), -100)
            labels[targets] = ids[targets]
            ends = np.zeros((len(ids), 2), dtype=np.int64)
            ends[targets, 1] = np.cumsum([len(values[i]) for i in ids[targets]])
            sides.append([torch.from_numpy(x)[None] for x in (labels, np.array(ids), ends)])
        (own_labels, own_ids, own_ends), (labels, ids, ends) = sides
        with torch.no_grad():
            theirs = logits_of(teacher, context.token_ids)
        loss = loss_of(
            logits_of(student, sample.token_ids), theirs, own_labels, labels, own_ids, ids, own_ends, ends
        )  # fmt: skip
        losses.append(loss * len(context.spans.lengths) / len(sample.target_ids))
    return torch.stack(losses).mean()


BETAS = [(0.0, {"divergence": "forward_kl"}), (1.0, {"divergence": "reverse_kl"}),
         (0.3, {"divergence": "jsd", "jsd_beta": 0.3})]  # fmt: skip
WEIGHTS = [
    ({"uld_use_hybrid_loss": False}, {}),
    ({"uld_use_hybrid_loss": True}, {}),
    ({"uld_hybrid_matched_weight": 0.7, "uld_hybrid_unmatched_weight": 2.0}, {}),
]


@pytest.mark.parametrize(("beta", "divergence"), BETAS)
@pytest.mark.parametrize("weights", [w for w, _ in WEIGHTS])
def test_loss_and_gradient_are_trls(
    other: Models,
    prompt_file: str,
    tmp_path: Path,
    beta: float,
    divergence: dict[str, Any],
    weights: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL's in float64, over spans of one and of several tokens; a small workspace cuts them into many pieces.

    Under the forward KL without TRL's floor of 1e-8, below which a student that lacks what its teacher says gets no
    gradient.
    """
    config = config_of(
        other, prompt_file, tmp_path, loss_normalization="sequence", gold=weights, workspace_bytes=200_000, **divergence
    )
    engine = make_engine(config)
    samples = weighed(engine, load_prompts([prompt_file]).prompts)
    lengths = np.concatenate([s.contexts[0].spans.lengths for s in samples])
    assert 1 in lengths and lengths.max() > 2 and len(samples) == 4
    student, teacher = (AutoModelForCausalLM.from_pretrained(other[n]).double().eval() for n in ("student", "bytes"))
    options = {"uld_hybrid_matched_weight": None, "uld_hybrid_unmatched_weight": None, "uld_use_hybrid_loss": True}
    with monkeypatch.context() as patch:
        if beta == 0:
            patch.setattr(torch.Tensor, "clamp_min", lambda self, _: self)
        expected = trl_loss(samples, engine, student, teacher, beta=beta, **{**options, **weights})
    expected.backward()
    loss, gradient = loss_and_gradient(engine, samples)
    assert abs(expected.item()) > 1e-3
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    theirs = {n: p.grad.float() for n, p in student.named_parameters() if p.grad is not None and n in gradient}
    assert_same_gradients(gradient, theirs, rtol=1e-3)


def test_spans_have_one_weight_each(other: Models, prompt_file: str, tmp_path: Path) -> None:
    """A span weighs as its tokens do on average; what the token log has is the loss."""
    engine = make_engine(config_of(other, prompt_file, tmp_path))
    samples = weighed(engine, load_prompts([prompt_file]).prompts)
    whole, _ = loss_and_gradient(engine, samples)
    for sample in samples:
        spans = sample.contexts[0].spans
        assert spans is not None and sample.kl_weight is not None
        last = np.append(np.diff(spans.student) > 0, True)
        sample.kl_weight = (last * spans.pooled(np.ones(len(last)))).astype(np.float32)
    again, _ = loss_and_gradient(engine, samples)
    assert again == pytest.approx(whole, rel=1e-6)
    engine.config = config_of(other, prompt_file, tmp_path, log_completions=True, log_tokens="all")
    engine._optimizer_step = lambda loss, norm: {"loss": loss}  # type: ignore[method-assign]
    logged = engine.update(Batch(samples=samples))
    told = sum(
        float(np.nansum(arrays["divergence"] * sample.kl_weight * sample.scale))
        for sample, (_, arrays) in zip(samples, logged.tokens, strict=True)
    )
    assert told == pytest.approx(whole, rel=1e-5)


def reference_gaps(sample: Sample, student: Any, teacher: Any) -> tuple[list[float], torch.Tensor]:
    """The gap of every span, and log p of every span, in float64."""
    context = sample.contexts[0]
    assert context.spans is not None
    found = []
    for model, ids, targets in (
        (student, sample.token_ids, sample.target_positions),
        (teacher, context.token_ids, context.target_positions),
    ):
        logprobs = logits_of(model, ids)[0, targets - 1].log_softmax(-1)
        found.append(logprobs.gather(1, torch.from_numpy(ids[targets])[:, None])[:, 0])
    own, theirs = found
    sums = [
        torch.stack([values[torch.from_numpy(span == n)].sum() for n in range(len(context.spans.lengths))])
        for values, span in ((own, context.spans.student), (theirs, context.spans.teacher))
    ]
    return (sums[1] - sums[0]).tolist(), sums[0]


@pytest.mark.parametrize("teacher", ["bytes", "pieces"])
@pytest.mark.parametrize("ended", [False, True])
def test_sampled_spans_against_float64(
    other: Models, prompt_file: str, tmp_path: Path, teacher: str, ended: bool
) -> None:
    """The gradient is that of -sum(gap of the span * log p(span)) over all targets; gaps over tokens are the KL."""
    config = config_of(other, prompt_file, tmp_path, teacher, advantage={"kl_mode": "sampled"})
    engine = make_engine(config)
    samples = weighed(engine, load_prompts([prompt_file]).prompts, ended=ended)
    student, judge = (AutoModelForCausalLM.from_pretrained(other[n]).double().eval() for n in ("student", teacher))
    total, whole, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for sample in samples:
        gaps, own = reference_gaps(sample, student, judge)
        spans = sample.contexts[0].spans
        assert spans is not None and (spans.student >= 0).all()
        np.testing.assert_allclose(sample.advantage, np.array(gaps)[spans.student], rtol=1e-4, atol=1e-4)
        assert sample.teacher_logprob is not None and sample.student_logprob is not None
        own_gap = sample.teacher_logprob[:, 0] - sample.student_logprob
        assert own_gap.sum() == pytest.approx(sum(gaps), rel=1e-4)
        total = total - (torch.tensor(gaps) * own).sum()
        whole, count = whole + sum(gaps), count + len(sample.target_ids)
    (total / count).backward()
    loss, gradient = loss_and_gradient(engine, samples)
    assert loss == pytest.approx(total.item() / count, rel=1e-4)
    theirs = {n: p.grad.float() for n, p in student.named_parameters() if p.grad is not None and n in gradient}
    assert_same_gradients(gradient, theirs, rtol=1e-3)
    metrics = engine.update(Batch(samples=samples)).metrics
    assert metrics[f"teacher_kl/{teacher}"] == pytest.approx(-whole / count, rel=1e-4)


def test_equal_tokenizers_give_plain_opd(other: Models, prompt_file: str, tmp_path: Path) -> None:
    """Where every boundary agrees a span is a token: the sampled form is that of the same teacher, read exactly."""
    results = []
    for alignment in ("spans", "none"):
        teachers = [{"model": other["big"], "tokenizer_alignment": alignment}, {"model": "self", "weights": "base"}]
        config = make_config(
            other, prompt_file, tmp_path, method="g_opd", teachers=teachers, g_opd={"reference": "self"}
        )
        engine = make_engine(config)
        samples = weighed(engine, load_prompts([prompt_file]).prompts, ended=True)
        results.append(loss_and_gradient(engine, samples))
    (one, gradient), (other_loss, theirs) = results
    assert one == pytest.approx(other_loss, rel=1e-5)
    assert_same_gradients(gradient, theirs)


def test_text_that_is_not_kept_is_not_judged(
    other: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tokens have neither gap nor loss, and are counted; where they are many, a check says so."""
    texts = ["AAAAAAA bb", "the answer", "ok A ok", "BBBB"]
    sampled = make_engine(config_of(other, prompt_file, tmp_path, "lower", advantage={"kl_mode": "sampled"}))
    batch = Batch(0, weighed(sampled, load_prompts([prompt_file]).prompts, texts))
    asyncio.run(sampled.method.annotate(batch))
    assert batch.metrics["alignment/share/lower"] < 0.8
    (check,) = [c for c in sampled.method.checks if c.failed == "alignment/unaligned"]
    assert check.fires(batch.metrics) and check.counts(batch.metrics)[0] >= 12
    fifth = {"alignment/unaligned": 2.0, "alignment/tokens": 10.0}
    assert check.fires(fifth) and not check.fires({**fifth, "alignment/tokens": 11.0})
    for sample in batch:
        spans = sample.contexts[0].spans
        assert spans is not None and sample.advantage is not None
        assert (sample.advantage[spans.student < 0] == 0).all() and (sample.advantage[spans.student >= 0] != 0).all()
    loss, _ = loss_and_gradient(sampled, list(batch))
    assert np.isfinite(loss)
    exact = make_engine(config_of(other, prompt_file, tmp_path, "lower"))
    samples = weighed(exact, load_prompts([prompt_file]).prompts, ["BBBB"])
    assert loss_and_gradient(exact, samples)[0] == 0


def test_an_empty_answer_is_dropped(other: Models, prompt_file: str, tmp_path: Path) -> None:
    for mode in ("sampled", "full_vocab"):
        engine = make_engine(config_of(other, prompt_file, tmp_path, advantage={"kl_mode": mode}))
        prompts = load_prompts([prompt_file]).prompts
        assert weighed(engine, prompts, ["", ""]) == []
        (kept,) = weighed(engine, prompts, ["", "the answer"])
        assert np.isfinite(loss_and_gradient(engine, [kept])[0])


def test_an_agents_turns(other: Models, prompt_file: str, tmp_path: Path) -> None:
    """Every turn is read in the teacher's tokens, answers in its template; a closed turn ends once."""
    engine = make_engine(config_of(other, prompt_file, tmp_path, "pieces", advantage={"kl_mode": "sampled"}))
    (prompt,) = load_prompts([prompt_file]).prompts[:1]
    said = [engine.tokenizer.encode(text, add_special_tokens=False) for text in ("the answer", "is 42")]
    said[0].append(engine.tokenizer.eos_token_id)
    answer = ({"role": "user", "content": "fox?"},)
    between = encode_answer(engine.tokenizer, answer, (), {}, said[0])
    turns = (
        Turn.of_prompt(engine.encode(prompt)), Turn("assistant", np.array(said[0]), trains=True),
        Turn("environment", np.array(between), messages=answer), Turn("assistant", np.array(said[1]), trains=True),
    )  # fmt: skip
    sample = Sample("0", prompt, turns, group="0")
    asyncio.run(engine.annotate(Batch(0, [sample])))
    context = sample.contexts[0]
    text = engine.teachers[0].tokenizer.decode(context.token_ids).replace("</s> [", "</s>[").removeprefix(" ")
    assert text == "[user] What is 0 + 0?</s>[assistant] the answer</s>[user] fox?</s>[assistant] is 42"
    assert context.spans is not None and (np.diff(context.spans.student) >= 0).all() and context.spans.student[0] == 0
    batch = Batch(0, [sample])
    asyncio.run(engine.score(batch))
    engine.measure(batch)
    engine.weigh(batch)
    models = (AutoModelForCausalLM.from_pretrained(other[n]).double().eval() for n in ("student", "pieces"))
    gaps, _ = reference_gaps(sample, *models)
    np.testing.assert_allclose(sample.advantage, np.array(gaps)[context.spans.student], rtol=1e-4, atol=1e-4)


def test_a_served_teacher_tells_its_own_tokens(other: Models, prompt_file: str, tmp_path: Path) -> None:
    """It judges spans as the same weights in this process do."""
    found = []
    with serve(other["bytes"]) as server:
        served = {"model": "tiny", "base_url": server.url, "tokenizer": other["bytes"], "score_top_k": 2}
        for teacher in (served, {"model": other["bytes"]}):
            teachers = [{**teacher, "tokenizer_alignment": "spans", "name": "t"}]
            config = config_of(other, prompt_file, tmp_path, teachers=teachers, advantage={"kl_mode": "sampled"})
            found.append(weighed(make_engine(config), load_prompts([prompt_file]).prompts, ended=True))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one.advantage, two.advantage, rtol=1e-3, atol=1e-3)
        assert np.any(one.advantage)


def test_an_exact_teacher_elsewhere_reads_in_its_own_tokens(other: Models, prompt_file: str, tmp_path: Path) -> None:
    """Loss and gradient are those of the same teacher in this process."""
    found = []
    with answering(Served(other["bytes"])) as url:
        for place in ({}, {"hidden_states_url": url}):
            teachers = [{"model": other["bytes"], "tokenizer_alignment": "spans", **place}]
            engine = make_engine(config_of(other, prompt_file, tmp_path, teachers=teachers))
            found.append(loss_and_gradient(engine, weighed(engine, load_prompts([prompt_file]).prompts)))
    (loss, gradient), (their_loss, their_gradient) = found
    assert loss == pytest.approx(their_loss, rel=1e-6) and loss > 0
    assert_same_gradients(gradient, their_gradient, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- whole runs


def test_a_run_from_a_configuration(
    other: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two experts of other tokenizers debate, and judge under their transcript; what is trained is theirs by spans."""
    teachers = [{"model": other[name], "tokenizer_alignment": "spans"} for name in ("bytes", "pieces")]
    with caplog.at_level(logging.INFO):
        train(make_config(other, prompt_file, tmp_path / "run", method="mad_opd", teachers=teachers, max_steps=2))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "has another tokenizer" in caplog.text
    last = rows[-1]
    assert np.isfinite(last["loss"]) and last["grad_norm"] > 0 and last["debate/states"] == 4
    for name in ("bytes", "pieces"):
        assert 0 < last[f"alignment/share/{name}"] <= 1 and 0 <= last[f"alignment/one_to_one/{name}"] <= 1
        assert f"teacher_weight/{name}" in last


@pytest.mark.parametrize("method", ["mt_seqkd", "gkd"])
def test_what_such_teachers_write_is_read_in_the_students_tokens(
    other: Models, prompt_file: str, tmp_path: Path, method: str
) -> None:
    """Supervised on its text; an answer that was cut off has no end."""
    teachers = [{"model": other["pieces"], "tokenizer_alignment": "spans"}]
    settings = {"gkd": {"lmbda": 0.0, "seq_kd": True}} if method == "gkd" else {}
    engine = make_engine(make_config(other, prompt_file, tmp_path, method=method, teachers=teachers, **settings))
    said = iter([("the answer", "stop"), ("fox", "length"), ("", "stop"), ("two", "stop")])

    async def generate(requests: Any, params: Any) -> list[Completion]:
        return [Completion(np.array([7, 8]), np.zeros(2), *reversed(next(said))) for _ in requests]

    engine.teachers[0].generate = generate  # type: ignore[method-assign]
    result = asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:4]))
    written = [engine.tokenizer.decode(s.target_ids) for s in result.samples]
    assert written == ["the answer<|im_end|>", "fox", "<|im_end|>", "two<|im_end|>"]
    assert result.metrics["grad_norm"] > 0


def test_one_teacher_of_each_kind(other: Models, prompt_file: str, tmp_path: Path) -> None:
    """Their losses add up, also beside rewards, whose advantage goes through the head on its own then."""
    same, apart = {"model": other["big"]}, {"model": other["bytes"], "tokenizer_alignment": "spans"}
    prompts, losses = load_prompts([prompt_file]).prompts, []
    for teachers in ([same, apart], [same, {**same, "name": "again"}], [apart, {**apart, "name": "again"}]):
        engine = make_engine(make_config(other, prompt_file, tmp_path, teachers=teachers))
        samples = weighed(engine, prompts)
        losses.append(loss_and_gradient(engine, samples)[0])
        plain = losses[-1]
        for sample in samples:
            sample.advantage = np.ones(len(sample.target_ids), dtype=np.float32)
        added = loss_and_gradient(engine, samples)[0] - plain
        for sample in samples:
            sample.kl_weight = np.zeros(len(sample.target_ids), dtype=np.float32)
        assert added == pytest.approx(loss_and_gradient(engine, samples)[0], rel=1e-5)
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)


def test_the_bundled_student_learns_from_another_tokenizer(other: Models, tmp_path: Path) -> None:
    """The README's tiny student, and a random teacher of bytes, end to end."""
    prompts = tmp_path / "train.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"C{i}+{i}"}) + "\n" for i in range(8)))
    student = str(Path(__file__).parents[2] / "examples" / "tiny" / "models" / "student")
    config = config_of({**other, "student": student}, str(prompts), tmp_path / "run", max_steps=2)
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["grad_norm"] > 0 and rows[-1]["alignment/share/bytes"] == 1


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "uni_opd", "num_generations": 2}, "method='uni_opd' is not possible with tokenizer_alignment"),
        ({"divergence": "skew_kl"}, "divergence='skew_kl' is not possible.*use reverse_kl, forward_kl or jsd"),
        ({"divergence": {"a": "skew_kl", "default": "jsd"}}, "divergence='skew_kl'"),
        ({"teacher_reduction": "mixture"}, "teacher_reduction='mixture' is not possible.*use sum"),
        ({"vocab_sample": 0.5}, "vocab_sample=0.5 is not possible.*use 0"),
        ({"vocab_parallel_head": True}, "vocab_parallel_head is not possible.*leave it out"),
        ({"gold": {"uld_hybrid_matched_weight": 1}}, "gold.uld_hybrid_unmatched_weight.*set both weights or neither"),
        ({"gold": {"uld_use_hybrid_loss": False, "uld_hybrid_matched_weight": 1, "uld_hybrid_unmatched_weight": 1}},
         "it belongs to uld_use_hybrid_loss: true"),
        ({"teachers": [{"model": "t"}]}, "none has tokenizer_alignment: spans; set it, or use 'opd'"),
        ({"teachers": [{"model": "self", "weights": "base", "tokenizer_alignment": "spans"}]}, "has its own tokenizer"),
        ({"teachers": [{"model": "t", "tokenizer_alignment": "spans", "base_url": "http://127.0.0.1:1/v1"}]},
         "base_url of teacher .*advantage.kl_mode sampled, or a local teacher"),
        ({"divergence": "jsd", "advantage": {"kl_mode": "sampled"}}, "advantage.kl_mode=sampled"),
        ({"advantage": {"kl_mode": "sampled"}, "gold": {"uld_use_hybrid_loss": False}}, "no effect with method"),
        ({"method": "opd", "teachers": [{"model": "t"}], "gold": {"uld_use_hybrid_loss": False}},
         "gold.uld_use_hybrid_loss=False has no effect with teachers of which none"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    other: Models, prompt_file: str, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_method(config_of(other, prompt_file, tmp_path, **changes))


def test_a_divergence_that_spans_do_not_have_is_refused() -> None:
    """Also where a method of one's own chooses it for some tokens."""
    rows = torch.zeros(1, 2)
    assert divergence("jsd", rows, rows, 0.5).item() == 0
    with pytest.raises(ValueError, match="'skew_kl' is not possible over spans"):
        divergence("skew_kl", rows, rows, 0.5)


def test_without_the_setting_another_tokenizer_stays_refused(other: Models, prompt_file: str, tmp_path: Path) -> None:
    config = make_config(other, prompt_file, tmp_path, method="opd", teachers=[{"model": other["pieces"]}])
    with pytest.raises(ValueError, match=r"does not share the student's tokenizer(.|\n)*alignment to spans"):
        make_engine(config)


def test_a_tokenizer_that_does_not_tell_its_bytes_is_refused_before_a_model_is_loaded(
    other: Models, prompt_file: str, tmp_path: Path
) -> None:
    folder = tmp_path / "pieces"
    shutil.copytree(other["bytes"], folder)
    (folder / "model.safetensors").unlink()
    word_piece().save_pretrained(folder)
    config = config_of({**other, "words": str(folder)}, prompt_file, tmp_path, "words")
    with pytest.raises(ConfigError, match=r"teacher 'pieces'.*WordPiece"):
        make_engine(config)


# -------------------------------------------------------------------------------------------------- a real model


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="opdengine fetch smollm2-135m --out FOLDER, and SMOLLM2=FOLDER")
@pytest.mark.parametrize("teaches", [False, True])
def test_smollm2(other: Models, prompt_file: str, tmp_path: Path, smollm2: str, teaches: bool) -> None:
    """A real vocabulary of 49,152 on one side, one of single bytes and few words on the other."""
    sides = {"student": other["student"], "real": smollm2} if teaches else {"student": smollm2, "real": other["pieces"]}
    config = config_of(
        {**other, **sides}, prompt_file, tmp_path / "run", "real", lora={"r": 4}, per_device_train_batch_size=2,
        max_completion_length=12, max_steps=2, temperature=0.7,
    )  # fmt: skip
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    name = Path(sides["real"]).name
    assert rows[-1]["grad_norm"] > 0 and rows[-1][f"alignment/share/{name}"] > (0.3 if teaches else 0.9)
