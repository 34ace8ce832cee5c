"""The student as its own teacher: with the weights of the start, of now, or their average."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_gradients, loss_and_gradient, make_config, make_engine, make_samples
from safetensors.torch import load_file

from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.models.backbone import load_model
from opdengine.models.lora import base_of
from opdengine.models.policy import policy
from opdengine.teachers import prefix
from opdengine.teachers.own import AveragedTeacher, SharedTeacher, restore_own, starts_of
from opdengine.training.run import train
from opdengine.types import Request, SamplingParams, TeacherContext

Models = dict[str, str]
LORA = {"r": 4, "lora_alpha": 12.0}
TEMPLATE = "{prompt} It is {answer}."
IDS = np.array([5, 9, 11, 30, 31, 7, 8])


def own(weights: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"model": "self", "weights": weights, **settings}]


def engine_of(models: Models, file: str, folder: Path, weights: str, teacher: Any = None, **changes: Any) -> Any:
    settings = {"method": "opd", "teachers": own(weights, **(teacher or {})), "teacher_prompt_template": TEMPLATE}
    return make_engine(make_config(models, file, folder, **{**settings, **changes}))


def disturb(model: Any) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def states(teacher: Any) -> torch.Tensor:
    context = TeacherContext("s", teacher.name, IDS, np.arange(2, 7))
    return asyncio.run(teacher.score([context]))[0].states


def written(teacher: Any) -> list[int]:
    (said,) = asyncio.run(teacher.generate([Request("r", (5, 9, 11), 0)], SamplingParams(max_tokens=5, temperature=0)))
    return said.token_ids.tolist()


def read_by(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return base_of(model).base_model(torch.from_numpy(IDS)[None]).last_hidden_state[0, 1:6]


def whole(model: Any) -> dict[str, torch.Tensor]:
    """float64: every weight, with what an adapter adds."""
    weights, low_rank = policy(model)
    found = {}
    for name, value in weights:
        found[name] = value.double()
        if low_rank is not None and name in low_rank:
            found[name] += (low_rank[name][0] @ low_rank[name][1]).double()
    return found


def test_the_base_under_an_adapter_is_the_model_without_it(models: Models, prompt_file: str, tmp_path: Path) -> None:
    engine = engine_of(models, prompt_file, tmp_path, "base", lora=LORA)
    (teacher,), student = engine.teachers, engine.student.model
    plain = load_model(models["student"]).eval()
    disturb(student)
    torch.testing.assert_close(states(teacher), read_by(plain), rtol=1e-5, atol=1e-5)
    moved = read_by(student.eval())
    assert (states(teacher) - moved).abs().max() > 0.01
    assert written(teacher) != engine.sampler.generate([Request("r", (5, 9, 11), 0)], SamplingParams(5, 0.0))[0][0]
    assert isinstance(teacher, SharedTeacher) and teacher.backbone is engine.student
    assert all(p.requires_grad for n, p in student.named_parameters() if "lora_" in n)  # after every call
    torch.testing.assert_close(read_by(student), moved)


@pytest.mark.parametrize("sharing", [0, 10**9])
@pytest.mark.parametrize(("weights", "lora"), [("base", LORA), ("base", None), ("ema", LORA), ("ema", None)])
def test_under_autocast_equal_weights_agree_exactly(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: Any, weights: str, lora: Any, sharing: int
) -> None:
    """Computed in float32 the same weights would give other logits, and AdamW scales what is left."""
    monkeypatch.setattr(prefix, "LEAST_SAVED", sharing)
    monkeypatch.setattr(prefix, "LEAST_WORK", 2.0 * sharing * 10**6)
    settings = {"lora": lora, "bf16": True, "teacher_prompt_template": None, "num_generations": 2}
    engine = engine_of(models, prompt_file, tmp_path, weights, **settings)
    assert engine.student.model.dtype == torch.float32 and engine.student.bf16
    loss, gradient = loss_and_gradient(engine, make_samples(engine, load_prompts([prompt_file]).prompts[:2]))
    if sharing or (weights, lora) == ("base", LORA):
        assert loss == 0 and not any(value.any() for value in gradient.values())
    else:  # a prefix that is read once is rounded otherwise
        assert abs(loss) < 1e-4 and engine.teachers[0]._scorer._exact


def test_present_weights_are_the_students_without_gradient(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """Loss and gradient are those of a frozen copy of the same weights."""
    engine = engine_of(models, prompt_file, tmp_path / "a", "live")
    disturb(engine.student.model)
    torch.testing.assert_close(states(engine.teachers[0]), read_by(engine.student.model.eval()))
    copied = Path(shutil.copytree(models["student"], tmp_path / "copy"))
    engine.student.model.save_pretrained(copied)
    frozen = make_engine(
        make_config(
            {**models, "student": str(copied)}, prompt_file, tmp_path / "b", method="opd",
            teachers=[{"model": str(copied)}], teacher_prompt_template=TEMPLATE,
        )
    )  # fmt: skip
    prompts = load_prompts([prompt_file]).prompts[:4]
    found = [loss_and_gradient(e, make_samples(e, prompts)) for e in (engine, frozen)]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and found[0][0] > 0.01
    assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize(("rate", "every"), [(0.3, 1), (0.25, 2), (1.0, 2)])
def test_averages_are_those_of_the_closed_form(
    models: Models, prompt_file: str, tmp_path: Path, rate: float, every: int, lora: Any
) -> None:
    engine = engine_of(
        models, prompt_file, tmp_path, "ema", {"teacher_update_rate": rate, "teacher_sync_steps": every},
        lora=lora, learning_rate=0.05, warmup_ratio=0.0,
    )  # fmt: skip
    (teacher,), prompts = engine.teachers, load_prompts([prompt_file]).prompts[:4]
    expected, marks = whole(engine.student.model), {teacher.fingerprint}
    for step in range(1, 4):
        asyncio.run(engine.step(prompts))
        if step % every == 0:
            now = whole(engine.student.model)
            expected = {n: (1 - rate) * value + rate * now[n] for n, value in expected.items()}
        marks.add(teacher.fingerprint)
    assert len(marks) == 1 + 3 // every
    for name, value in teacher.backbone.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.backbone.model.parameters())
    if rate == 1:
        at_the_end = whole(engine.student.model)
        assert max((at_the_end[n] - v).abs().max() for n, v in expected.items()) > 1e-3  # step 3 is not in it


def test_averages_of_half_precision_are_not_lost(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """0.001 of a step of 0.01 is far below what bfloat16 tells apart."""
    engine = engine_of(models, prompt_file, tmp_path, "ema", {"dtype": "bfloat16", "teacher_update_rate": 1e-3})
    teacher: AveragedTeacher = engine.teachers[0]
    before = {n: t.clone() for n, t in teacher.tensors().items()}
    for parameter in engine.student.model.parameters():
        parameter.data += 0.01
    for _ in range(100):
        teacher.follow()
    share = 1 - (1 - 1e-3) ** 100
    now = dict(engine.student.model.named_parameters())
    for name, value in teacher.tensors().items():
        assert value.dtype == torch.float32
        expected = before[name] + share * (now[name].detach() - before[name])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "lora"), [("base", None), ("base", LORA), ("live", None), ("ema", None), ("ema", LORA)]
)
def test_runs_of_every_kind_are_resumed_with_the_same_bits(
    models: Models, prompt_file: str, tmp_path: Path, weights: str, lora: Any
) -> None:
    settings: dict[str, Any] = {
        "method": "opd", "teachers": own(weights), "teacher_prompt_template": TEMPLATE, "lora": lora, "save_steps": 1,
        "max_steps": 3,
    }  # fmt: skip
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    whole_run = train(make_config(models, prompt_file, tmp_path / "a", **settings), progress=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in ("final", "checkpoints/step_3", "checkpoints/step_2", "config.yaml"):
        shutil.rmtree(tmp_path / "b" / path) if path != "config.yaml" else (tmp_path / "b" / path).unlink()
    again = make_config(models, prompt_file, tmp_path / "b", **settings, resume_from_checkpoint="latest")
    resumed = train(again, progress=False)
    one, other = (load_file(run.final_model / file) for run in (whole_run, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    averages = [tmp_path / run / "checkpoints" / "step_3" / "teachers.safetensors" for run in "ab"]
    assert [a.is_file() for a in averages] == [weights == "ema"] * 2
    if weights == "ema":
        assert averages[0].read_bytes() == averages[1].read_bytes()


def test_the_start_must_still_be_there(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """A resumed run judges with the weights of its start, not with those of its checkpoint or of another model."""
    copy = Path(shutil.copytree(models["student"], tmp_path / "model"))
    settings: dict[str, Any] = {
        "method": "opd", "teachers": own("base"), "teacher_prompt_template": TEMPLATE, "save_steps": 1, "max_steps": 2,
    }  # fmt: skip
    here = {**models, "student": str(copy)}
    train(make_config(here, prompt_file, tmp_path / "run", **settings), progress=False)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    shutil.copy(tmp_path / "run" / "checkpoints" / "step_1" / "model" / "model.safetensors", copy)
    again = make_config(here, prompt_file, tmp_path / "run", **settings, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match="is another model than the run to resume had"):
        train(again, progress=False)


def test_a_checkpoint_of_another_start_is_refused(models: Models, prompt_file: str, tmp_path: Path) -> None:
    engine = engine_of(models, prompt_file, tmp_path, "base")
    restore_own(engine.teachers, {}, starts_of(engine.teachers), 1)
    with pytest.raises(ConfigError, match="'self' has the weights that the run began with, but the model's are others"):
        restore_own(engine.teachers, {}, {"self": "other"}, 1)
    with pytest.raises(ConfigError, match="does not say which weights teacher 'self' began with"):
        restore_own(engine.teachers, {}, {}, 1)


def test_an_average_that_would_not_follow_is_refused(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """A weight that the student has under another name, or not at all, would stay as it was at the start."""
    (teacher,) = engine_of(models, prompt_file, tmp_path, "ema").teachers
    weights, _ = policy(teacher._followed)
    some = [(name, value) for name, value in weights if "embed" not in name]
    with pytest.raises(RuntimeError, match=r"cannot follow .* no weights \['model.embed_tokens.weight'\]"):
        teacher._move((some, None), 0.5)


@pytest.mark.parametrize(
    ("teacher", "others", "words"),
    [
        ({"weights": None}, {}, "weights=None is not possible; say which weights of the student judge: base, live or"),
        ({"weights": "old"}, {}, r"weights='old' is not possible; choose one of \['base', 'live', 'ema'\]"),
        ({"model": "big", "weights": "base"}, {}, "weights='base' is not possible; they belong to model: self"),
        ({"teacher_update_rate": 0.1}, {}, "teacher_update_rate=0.1 is not possible; it belongs to weights: ema"),
        ({"teacher_sync_steps": 2}, {}, "teacher_sync_steps=2 is not possible; it belongs to weights: ema"),
        ({"weights": "ema", "teacher_update_rate": 0}, {}, "teacher_update_rate=0.0 is not possible; .* 1 copies"),
        ({"weights": "ema", "teacher_update_rate": 1.1}, {}, "teacher_update_rate=1.1 is not possible"),
        ({"weights": "ema", "teacher_sync_steps": 0}, {}, "teacher_sync_steps=0 is not possible"),
        ({"base_url": "http://h/v1"}, {}, "weights='base' is not possible; .* which no server holds"),
        ({"writer_base_url": "http://h/v1"}, {}, "writer_base_url=.* is not possible; a server does not follow"),
        ({"weights": "live", "shard": True}, {}, "shard=True is not possible; weights: live are the student's own"),
        ({"dtype": "bfloat16"}, {"lora": LORA}, "dtype='bfloat16' is not possible; weights: base are"),
        ({"weights": "ema"}, {"use_vllm": True, "max_staleness": 1}, "weights='ema' is not possible; max_staleness"),
        ({"weights": "live"}, {"teacher_prompt_template": None}, "weights='live' is not possible; .*nothing would be"),
    ],
)  # fmt: skip
def test_what_the_student_cannot_be_is_refused(
    models: Models, tmp_path: Path, teacher: dict[str, Any], others: dict[str, Any], words: str
) -> None:
    settings = {"method": "opd", "teacher_prompt_template": TEMPLATE, **others}
    with pytest.raises(ConfigError, match=words):
        make_config(models, "d.jsonl", tmp_path, teachers=[{"model": "self", "weights": "base", **teacher}], **settings)


def test_it_reads_in_the_students_template_or_its_own(models: Models, prompt_file: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}{{ hint }}]<|im_end|>{% endfor %}"
    chat = ({"role": "user", "content": "Q"},)
    engine = engine_of(
        models, prompt_file, tmp_path, "live", chat_template=template, chat_template_kwargs={"hint": "!"}
    )
    assert engine.teachers[0].encode(chat) == engine.tokenizer.encode("[Q!]<|im_end|>")
    engine = engine_of(
        models, prompt_file, tmp_path, "live", {"chat_template_kwargs": {"hint": "?"}},
        chat_template=template, chat_template_kwargs={"hint": "!"},
    )  # fmt: skip
    assert engine.teachers[0].encode(chat) == engine.tokenizer.encode("[Q?]<|im_end|>")
