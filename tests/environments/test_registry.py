"""Environments by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from opdengine.config.train import EnvironmentConfig
from opdengine.data.prompts import DataError
from opdengine.environments import ENVIRONMENTS, load_environment
from opdengine.environments.setup import load_tasks
from tiny.agents.house import HOUSE, House

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["search", "recorded", "trl"])
def test_built_in_names(name):
    found = load_environment(name)
    assert f"{found.__module__}:{found.__name__}" == ENVIRONMENTS[name]


def test_users_classes():
    assert load_environment("tiny.agents.house:House") is House
    assert load_environment(HOUSE).__name__ == "House"
    assert load_environment(f"{HERE / 'troubled.py'}:Troubled").__name__ == "Troubled"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hose", r"unknown environment 'hose'; use one of \['alfworld', 'recorded'"),
        ("house", r"environment 'house' is not built in any more; write 'examples/tiny/agents/house\.py:House'"),
        ("no.such.module:House", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("tiny.agents.house:Hose", "cannot be loaded: .*'Hose'"),
        ("nothing.py:House", "there is no Python file 'nothing.py'"),
        ("tiny.agents.house:TYPES", "not a class with the methods tasks, reset, step, close; tasks, reset"),
        (f"{HERE / 'counter_game.py'}:CounterGame", "tasks, step, close missing"),
    ],
)
def test_what_is_no_environment_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_environment(name)


def test_a_file_that_does_not_compile_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("class Bad(:\n")
    with pytest.raises(
        ValueError, match=r"bad\.py:Bad' cannot be loaded: .*bad.py, line 1: SyntaxError: invalid syntax"
    ):
        load_environment(f"{tmp_path / 'bad.py'}:Bad")


def test_a_missing_package_is_a_mistake_of_the_user_with_its_remedy(tmp_path):
    file = tmp_path / "needy.py"
    file.write_text(
        "class Needy:\n    @classmethod\n    def tasks(cls, split):\n        raise ImportError('pip install needed')\n"
        "    reset = step = close = None.__init__\n"
    )
    with pytest.raises(
        DataError, match=r"no tasks of split 'train': .*needy.py, line 4: ImportError: pip install needed"
    ):
        load_tasks(EnvironmentConfig(name=f"{file}:Needy"), "train")


def test_the_class_that_the_documentation_shows_plays(tmp_path):
    page = (HERE.parents[1] / "docs" / "extend" / "environment.md").read_text()
    file = tmp_path / "guess.py"
    file.write_text(page.partition("```python\n")[2].partition("```")[0])
    environment = load_environment(f"{file}:Guess")(largest=20)
    task = environment.tasks("test", largest=20)[1]
    environment.reset(seed=0, task=task)
    *wrong, right = [environment.step({"role": "assistant", "content": text}) for text in ("hm", "3", "10")]
    assert [step.info["failure"] for step in wrong] == ["unparseable", ""] and not any(step.done for step in wrong)
    assert right.done and right.info["success"]


def test_importing_the_package_imports_no_environment():
    import subprocess

    code = (
        "import sys, opdengine.environments\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'textworld', 'alfworld')"
        " or m.startswith('opdengine.environments.search')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cuont": 3},
            r"environment.options.cuont is unknown; did you mean 'count'\? '.*House' has \['count', 'format'",
        ),
        ({"zzz": 3}, r"environment.options.zzz is unknown; '.*house.py:House' has \['count'"),
        ({"count": "many"}, "environment.options.count='many' has the wrong type; expected int"),
        ({"count": True}, "environment.options.count=True has the wrong type; expected int"),
        ({"instructions": 1}, "environment.options.instructions=1 has the wrong type; expected bool"),
    ],
)
def test_options_that_a_class_describes_are_checked(options, message):
    with pytest.raises(DataError, match=message):
        load_tasks(EnvironmentConfig(name=HOUSE, options=options), "train")


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
def test_built_in_environments_describe_their_options(name):
    assert "count" in load_environment(name).option_class.__dataclass_fields__ or name in ("search", "recorded", "trl")


def test_options_of_a_class_of_ones_own_are_its_keywords(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "class Own:\n    @classmethod\n    def tasks(cls, split, largest=10):\n        return [{'id': largest}]\n"
        "    reset = step = close = None.__init__\n"
        "class Free(Own):\n    @classmethod\n    def tasks(cls, split, **options):\n        return [{'id': 'x'}]\n"
    )
    assert load_tasks(EnvironmentConfig(name=f"{file}:Own", options={"largest": 2.5}), "train").prompts[0].id == "2.5"
    with pytest.raises(DataError, match=r"environment.options.larges is unknown; did you mean 'largest'\?"):
        load_tasks(EnvironmentConfig(name=f"{file}:Own", options={"larges": 2}), "train")
    assert load_tasks(EnvironmentConfig(name=f"{file}:Free", options={"x": 2, "network": True}), "train").prompts
