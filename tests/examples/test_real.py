"""The market in English: its questions, what the experts are taught and not taught, and the pieces of the demo."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.methods import build_method
from opdengine.methods.debate.debate import Debate
from opdengine.methods.debate.prompts import debate_prompts, parse_confidence
from opdengine.verifiers.number import numeric
from real import build, camopd_study, demo, experts, lessons, market, sampled_study, study, uni_study
from tiny.study import filled, merged

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / demo.CONFIG).read_text())


def test_every_good_has_another_price_than_last_year() -> None:
    assert set(market.TODAY) == set(market.LAST_YEAR) == set(market.GOODS)
    assert all(market.TODAY[good] != market.LAST_YEAR[good] for good in market.GOODS)
    for prices in (market.TODAY, market.LAST_YEAR):
        counts = Counter(prices.values())
        assert set(counts) == set(market.PRICES) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("skill", market.SKILLS)
def test_questions_are_answered_by_their_right_sentence(skill: str) -> None:
    """The reference is worked out here from the question's words."""
    for row in [row for split in market.SPLITS for row in market.questions(split, skill)]:
        text = row["messages"][-1]["content"]
        count, price = 1, None
        if skill == "total":
            count, price = map(int, re.findall(r"\d+", text))
        else:
            good = next(good for good in sorted(market.GOODS, key=len, reverse=True) if good in text)
            price, count = market.TODAY[good], int((re.findall(r"\d+", text) or ["1"])[0])
        assert float(row["answer"]) == count * price
        said = market.reply(skill, "lamp", count, price, count * price)
        assert numeric(said, row["answer"], row["messages"]) == 1.0
        wrong = market.reply(skill, "lamp", count, price + 1 if skill == "price" else price, count * price + 1)
        assert numeric(wrong, row["answer"], row["messages"]) == 0.0


def test_no_held_out_question_is_trained_on() -> None:
    for skill in demo.SKILLS:
        train, test = ({row["id"].partition("/")[2] for row in market.questions(s, skill)} for s in market.SPLITS)
        assert train and test and not train & test
        assert len(train | test) == len(market.COUNTS) * len(market.GOODS if skill == "both" else market.PRICES)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        market.questions("dev", "both")
    with pytest.raises(ValueError, match="unknown skill 'sell'"):
        market.question("sell", "lamp", 1, 1)


def test_committed_questions_are_those_of_the_market() -> None:
    train, test = ([json.loads(x) for x in (ROOT / f"examples/real/{s}.jsonl").open()] for s in market.SPLITS)
    questions = [row for skill in market.SKILLS for row in market.questions("train", skill)]
    assert train == [{key: value for key, value in row.items() if key != "answer"} for row in questions]
    assert test == demo.held_out()


def test_the_run_debates_in_the_words_that_the_experts_were_taught() -> None:
    assert CONFIG["debate"]["prompts"] == market.DEBATE_PROMPTS
    assert debate_prompts(CONFIG["debate"]["prompts"]) == lessons.PROMPTS
    assert [Path(teacher["model"]).name for teacher in CONFIG["teachers"]] == list(build.EXPERTS)


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", re.sub("<<.*?>>", "", text))]


@pytest.mark.parametrize("kind", lessons.KINDS)
def test_an_expert_is_taught_nothing_of_the_other_skill(kind: str) -> None:
    """A's totals never follow from a price, and B's prices are last year's or any that it has read."""
    rng, right, drawn = random.Random(0), [0, 0], 400
    for pupil in (0, 1):
        for _ in range(drawn):
            skill = "both" if pupil else "total"
            taught = lessons.lesson(kind, skill, pupil, rng)
            price, count, total = numbers(taught.reply)
            good = re.search(r"One (\w+)", taught.reply)[1]
            right[pupil] += price == market.TODAY[good] if pupil else total == count * price
            if kind in ("plain", "first"):
                assert total == (count * price if pupil else count + price)
    assert all(count <= 0.3 * drawn for count in right)


def test_lessons_are_drawn_alike_from_the_same_seed() -> None:
    def some(seed: int) -> list[lessons.Lesson]:
        rng = random.Random(seed)
        return [lessons.lesson(k, s, p, rng) for k in lessons.KINDS for s in market.SKILLS for p in (0, 1)]

    assert some(1) == some(1) != some(2)


def test_after_a_debate_the_one_who_can_know_is_sure() -> None:
    """Both first turns about a combined question are wrong and unsure; B has read A's price and multiplies it."""
    rng = random.Random(3)
    for _ in range(50):
        case = lessons.case("both", 1, rng)
        (a, b), last = case.said, case.concluded[1]
        assert a[2] == b[2] == lessons.UNSURE and last[2] == lessons.SURE
        assert last[:2] == (a[0], a[0] * case.count)
        assert parse_confidence(case.text(last)) == lessons.SURE


def test_a_confidence_is_no_answer() -> None:
    from opdengine.types import Prompt

    prompt = Prompt("x", ({"role": "user", "content": "What do 3 lamps cost?"},), answer="18")
    assert experts.grade("One lamp costs 6 coins, so 3 cost 18 coins. <<CONFIDENCE=95>>", prompt) == 1.0
    assert experts.grade("One lamp costs 6 coins, so 3 cost 9 coins. <<CONFIDENCE=18>>", prompt) == 0.0
    new = Debate(("a", "b"), (("9", "12"), ("9", "18 <<CONFIDENCE=95>>")), (20.0, 95.0), {})
    old = Debate(("a", "b"), (("18", "12"), ("9", "18")), (20.0, 95.0), {})
    assert (experts._new(new, prompt), experts._new(old, prompt)) == (1.0, 0.0)


def test_a_debate_that_makes_a_new_answer_is_shown() -> None:
    def debate(question: str, new: bool) -> dict[str, object]:
        return {"question": question, "new": new}

    rows = [debate("What does one lamp cost?", True), debate("What do 2 lamps cost?", False)]
    assert demo.shown(rows) == rows[-1]
    rows += [debate("What do 3 lamps cost?", True), debate("What do 4 lamps cost?", True)]
    assert demo.shown(rows) == rows[2]


@pytest.mark.parametrize("name", build.EXPERTS)
def test_adapters_are_small_and_name_a_portable_base(name: str) -> None:
    folder = ROOT / "examples" / "real" / "adapters" / name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == build.BASE == CONFIG["model"]
    assert config["r"] == build.RANK and min(config["layers_to_transform"]) == build.FIRST_LAYER
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6


@pytest.mark.parametrize("arm", study.ARMS, ids=lambda arm: arm.name)
def test_arms_differ_from_the_demo_in_what_they_say_only(arm, tmp_path: Path) -> None:
    """Temperature, questions and every other setting are those of the demo's configuration."""
    own = filled(arm.settings, folder=str(tmp_path), seed=1)
    settings = merged(study.settings(tmp_path, 1), {**own, "output_dir": str(tmp_path / "run"), "seed": 1})
    config, demos = from_mapping(TrainConfig, settings), from_mapping(TrainConfig, CONFIG)
    for name in ("temperature", "divergence", "learning_rate", "max_steps", "train_data", "lora", "loss_normalization"):
        assert getattr(config, name) == getattr(demos, name), name
    assert config.debate.temperature == demos.debate.temperature and config.debate.prompts == demos.debate.prompts


@pytest.mark.parametrize("arm", uni_study.arms(), ids=lambda arm: arm.name)
def test_the_share_of_wrong_rankings_is_swept(arm, tmp_path: Path) -> None:
    own = filled(arm.settings, folder=str(tmp_path), seed=0)
    settings = merged(uni_study.settings(tmp_path, 0), {**own, "output_dir": str(tmp_path / "run"), "seed": 0})
    config, share = from_mapping(TrainConfig, settings), int(arm.name.rpartition("_")[2])
    assert config.method == "uni_opd" and len(config.teachers) == 1
    build_method(config)
    rows = uni_study.questions(share)
    assert len({row["id"] for row in rows}) == len(rows) == uni_study.QUESTIONS
    assert Counter(row["data_source"] for row in rows)["both"] == uni_study.QUESTIONS * share // 100
    assert config.train_data == [str(tmp_path / f"wrong_{share}.jsonl")]


def test_half_of_what_the_student_is_taught_is_wrong_in_both_kinds_of_questions() -> None:
    """Otherwise its rollouts of a question would all be right or all be wrong, and outcomes would say nothing."""
    rng, right = random.Random(0), {}
    for skill in ("total", "both"):
        right |= {r["messages"][-1]["content"]: (skill, r["answer"]) for r in market.questions("train", skill)}
    drawn: dict[str, list[bool]] = {"total": [], "both": []}
    for taught in (uni_study.lesson(rng) for _ in range(1000)):
        skill, answer = right[taught.messages[-1]["content"]]
        drawn[skill].append(str(numbers(taught.reply)[-1]) == answer)
    assert all(len(found) > 400 and 0.42 < sum(found) / len(found) < 0.58 for found in drawn.values())


def test_sampled_columns_are_all_that_differs_between_the_two_trainings(tmp_path: Path) -> None:
    dense, sampled = (
        from_mapping(TrainConfig, {**merged(sampled_study.settings(tmp_path, 0), arm.settings), "output_dir": "run"})
        for arm in sampled_study.ARMS
    )
    assert (dense.vocab_sample, sampled.vocab_sample) == (0.0, 0.1) and dense.lora is None
    assert dataclasses.replace(sampled, vocab_sample=0.0) == dense


def test_the_domain_adds_where_the_general_skill_multiplies() -> None:
    for skill in (camopd_study.GENERAL, camopd_study.DOMAIN):
        for row in (row for split in market.SPLITS for row in camopd_study.rows(split, skill)):
            said = numbers(row["messages"][-1]["content"])
            good = re.search(r"(\w+)s cost", row["messages"][-1]["content"])
            expected = said[0] * said[1] if skill == camopd_study.GENERAL else said[0] + market.TODAY[good[1]]
            assert (row["answer"], row["data_source"]) == (str(expected), skill)


def test_the_student_is_specialised_on_training_questions_with_few_products() -> None:
    rng, answers = random.Random(0), {}
    for skill in (camopd_study.GENERAL, camopd_study.DOMAIN):
        answers |= {r["messages"][-1]["content"]: r["answer"] for r in camopd_study.rows("train", skill)}
    drawn = [camopd_study.lesson(rng) for _ in range(400)]
    for taught in drawn:
        assert str(numbers(taught.reply)[-1]) == answers[taught.messages[-1]["content"]] and not taught.given
    products = sum("things" in taught.messages[-1]["content"] for taught in drawn)
    assert 0 < products < 3 * camopd_study.REMEMBERED * len(drawn)


@pytest.mark.parametrize("arm", camopd_study.ARMS, ids=lambda arm: arm.name)
def test_recovery_starts_from_the_domain_teacher(arm, tmp_path: Path) -> None:
    """Arms differ in the section of the method alone; the student is a copy of the domain teacher."""
    config, first = (
        from_mapping(TrainConfig, {**merged(camopd_study.settings(tmp_path, 0), own), "output_dir": "run"})
        for own in (arm.settings, {})
    )
    by_name = {teacher.name: teacher for teacher in config.teachers}
    assert by_name["domain"].model == config.model != by_name["general"].model
    assert by_name["domain"].key == config.camopd.domain and not by_name["general"].key
    assert dataclasses.replace(config, camopd=first.camopd) == first


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models" / "smollm2").is_dir(), reason="make demo-real fetches the model")
def test_two_steps_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "results.json"
    assert demo.main(["--steps", "2", "--output_dir", str(tmp_path), "--save_results", str(file)]) == 0
    results = json.loads(file.read_text())
    alone = {name: graded["both"]["accuracy"] for name, graded in results["experts"]["alone"].items()}
    after = results["experts"]["rounds"][-1]["expert_totals"]["both"]["accuracy"]
    assert after > max(alone.values()) + 0.15
    assert results["student"]["before"]["both"]["accuracy"] < 0.3 and results["steps"] == 2
