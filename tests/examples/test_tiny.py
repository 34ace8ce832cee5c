"""The demo's world: task, tokenizer, debate rendering and the shipped models."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from opdengine.methods.debate.prompts import debate_prompts, parse_confidence  # noqa: E402
from tiny import lessons, measure, task, training  # noqa: E402
from tiny.tokenizer import build_tokenizer  # noqa: E402

MODELS = EXAMPLES / "tiny" / "models"
FOLDERS = ("teacher_convert", "teacher_compile", "student")
TURN = "5421|71+0*<<CONFIDENCE=95>>"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def report():
    return json.loads((MODELS / "report.json").read_text())


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval() for name in FOLDERS}


@pytest.mark.parametrize("skill", task.SKILLS)
def test_splits_share_no_prompt_and_no_half(skill):
    halves = {}
    for split in task.SPLITS:
        rows = task.prompts(split, skill, 200, seed=3)
        assert len({row["prompt"] for row in rows}) == 200
        assert {task.split_of(row["prompt"]) for row in rows} == {split}
        halves[split] = {half for row in rows for half in task._halves(row["prompt"]) if half}
    for one, other in itertools.combinations(halves.values(), 2):
        assert not one & other


def test_prompts_are_reproducible_and_graded_right():
    for skill in task.SKILLS:
        rows = task.prompts("train", skill, 50, seed=1)
        assert rows == task.prompts("train", skill, 50, seed=1)
        assert rows != task.prompts("train", skill, 50, seed=2)
        assert all(
            task.verify(row["answer"], row["answer"], [{"role": "user", "content": row["prompt"]}]) == 1.0
            for row in rows
        )
        assert {row["data_source"] for row in rows} == {skill}


def test_more_prompts_than_a_split_holds_are_refused():
    with pytest.raises(ValueError, match="holds about"):
        task.prompts("test", "convert", 4000)


def test_answers_agree_with_python():
    for row in task.prompts("test", "convert", 50):
        assert int(row["prompt"][1:], 2) == int(row["answer"], 8)
    for row in task.prompts("test", "compile", 50):
        assert task._run(row["answer"], range(10)) == eval(row["prompt"][1:])


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("5421", "5421", 1.0),
        ("05421", "5421", 0.0),
        ("5421 ", "5421", 0.0),
        ("", "5421", 0.0),
        ("71+0*", "71+0*", 1.0),
        ("17+0*", "71+0*", 1.0),  # the sum commutes
        ("071+*", "71+0*", 1.0),  # so does the product
        ("170+*", "71+0*", 0.0),  # another expression
        ("70*1*", "71+0*", 0.0),  # the same value with these digits, another program
        ("0", "71+0*", 0.0),
        ("71+0*0*", "71+0*", 0.0),
        ("7+10*", "71+0*", 0.0),  # an empty stack
        ("710+*+", "71+0*", 0.0),
        ("71+0", "71+0*", 0.0),
        ("", "71+0*", 0.0),
        ("52-3-", "52-3-", 1.0),
        ("523--", "52-3-", 0.0),
        ("5421|17+0*", "5421|71+0*", 1.0),
        ("5421|71+0", "5421|71+0*", 0.0),
        ("5420|71+0*", "5421|71+0*", 0.0),
        ("5421", "5421|71+0*", 0.0),
        ("5421|71+0*|", "5421|71+0*", 0.0),
        (TURN, "5421|71+0*", 0.0),
    ],
)
def test_grade(text, answer, right):
    assert task.grade(text, answer) == right


def test_ids_and_text_determine_each_other(tokenizer):
    rng = random.Random(0)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    for _ in range(500):
        ids = rng.choices(ordinary, k=12)
        assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids


def test_chat_template_gives_the_expected_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    user, assistant, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    chat = [{"role": "user", "content": "C(7+1)*0"}]
    content = tokenizer.convert_tokens_to_ids(list("C(7+1)*0"))
    reply = tokenizer.convert_tokens_to_ids(list("71+0*"))
    asked = [user, *content, end, assistant]
    for t in (tokenizer, reloaded):
        assert t.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == asked
        told = t.apply_chat_template([*chat, {"role": "assistant", "content": "71+0*"}], return_dict=False)
        assert told == [*asked, *reply, end]
        assert t.eos_token_id == end
        assert t.pad_token_id not in (None, end)


def test_debates_render_without_unknown_tokens(tokenizer):
    prompts = debate_prompts(task.DEBATE_PROMPTS)
    state = [{"role": "user", "content": task.prompts("test", "both", 1)[0]["prompt"]}]
    rounds = [[TURN] * 8, [TURN] * 8]
    for expert in range(8):
        for messages in (
            prompts.first_messages(state, expert, True),
            prompts.later_messages(state, expert, rounds, True),
            prompts.later_messages(state, expert, rounds, False),
            prompts.score_messages(state, expert, rounds),
        ):
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert tokenizer.unk_token_id not in ids
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert tokenizer.decode(ids) == text
    assert prompts.first_messages(state, 0, False) == state


def test_a_lesson_aligns_labels_with_predicting_positions(tokenizer):
    chat = lessons.Chat([{"role": "user", "content": "M000000000001"}], "0001", "95", "convert")
    (lesson,) = lessons.encode(tokenizer, [chat], random.Random(0), corrupt=1.0)
    shown = [tokenizer.decode(i) for i, label in zip(lesson.inputs, lesson.labels, strict=True) if label >= 0]
    taught = [tokenizer.decode(label) for label in lesson.labels if label >= 0]
    assert taught == [*"0001", "<<CONFIDENCE=", "9", "5", ">>", "<|end|>"]
    assert shown == ["<|assistant|>", *taught[:-1]]


def test_corruption_keeps_labels_right(tokenizer):
    chat = lessons.Chat([{"role": "user", "content": "M000000000001"}], "0001", skill="convert")
    for lesson in lessons.encode(tokenizer, [chat] * 50, random.Random(0), corrupt=1.0):
        taught = tokenizer.decode([label for label in lesson.labels if label >= 0])
        assert taught.removeprefix("0001").replace("<|end|>", "") == ""
        assert len(lesson.inputs) == len(lesson.labels)


@pytest.mark.parametrize("expert", [0, 1])
def test_debate_lessons_do_not_leak_the_foreign_skill(expert):
    pupil = lessons.Pupil(expert, foreign_problems=10, rng=random.Random(0))
    foreign = lessons.OWN_SKILL[1 - expert]
    answers = [pupil.debate(foreign, 2) for _ in range(300)]
    leaked = sum(task.grade(conclusion, _solve(prompt)) for prompt, _, conclusion in answers)
    assert leaked <= 30  # a random program is right by luck now and then
    assert len({pupil.alone(foreign)[0] for _ in range(300)}) <= 10


@pytest.mark.parametrize("name", FOLDERS)
def test_shipped_models_reach_their_reported_accuracy(name, models, tokenizer, report):
    reported = report["student_before"] if name == "student" else report["teachers"][name]
    n = 100
    for skill in task.SKILLS:
        expected = reported[skill] if name == "student" else reported[skill]["plain"]
        measured = measure.accuracy(models[name], tokenizer, task.prompts(report["split"], skill, n, seed=9))
        # Two samples, of n and of the report's size; 4 standard errors and a floor for 0 and 1.
        spread = (max(expected * (1 - expected), 0.01) * (1 / n + 1 / report["prompts_per_skill"])) ** 0.5
        assert abs(measured - expected) <= 4 * spread, f"{skill}: {measured} against {expected} in the report"


def test_shipped_tokenizers_are_the_one_that_is_built(tokenizer):
    for name in FOLDERS:
        shipped = AutoTokenizer.from_pretrained(MODELS / name)
        assert shipped.get_vocab() == tokenizer.get_vocab()
        assert shipped.chat_template == tokenizer.chat_template


def test_shipped_teachers_debate(models, tokenizer, report):
    rows = task.prompts("test", "both", 40, seed=9)
    teachers = [models[name] for name in FOLDERS[:2]]
    debates = training.hold_debates(teachers, tokenizer, rows, rounds=2)
    assert all(parse_confidence(text) is not None for debate in debates for turn in debate for text in turn)
    for k, name in enumerate(FOLDERS[:2]):
        right = [
            task.grade(lessons.spoken_answer(d[-1][k]), row["answer"]) for d, row in zip(debates, rows, strict=True)
        ]
        assert sum(right) / len(right) >= report["teachers"][name]["both"]["after_debate"] - 0.2


def test_shipped_models_are_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 1_500_000


def _solve(prompt: str) -> str:
    skill = "convert" if prompt.startswith("M") else "compile"
    if skill == "convert":
        return f"{int(prompt[1:], 2):0{task.BITS // 3}o}"
    body = prompt[1:]
    if body[0] == "(":
        return f"{body[1]}{body[3]}{body[2]}{body[6]}{body[5]}"
    return f"{body[0]}{body[3]}{body[5]}{body[4]}{body[1]}"
