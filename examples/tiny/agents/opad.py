"""OPAD beside its baselines on the tiny agents; ``python examples/train_opad.py`` calls :func:`demo`.

Two experts know different kinds of tasks. On every state that the student was really in they debate, and
judge the action that it took there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdengine.metrics import write_jsonl
from tiny.agents import world
from tiny.agents.arms import MODELS, Arm, main, parser
from tiny.agents.house import House

EXPERTS = ("expert_bring", "expert_open")
SAMPLED_STEPS = 3
RECORDED_STEPS = 7
"""Turns of an expert's episode, about: so many recorded steps stand for one live episode."""


def arms(batch_size: int, records: Path) -> list[Arm]:
    """Everything that is compared.

    Args:
        batch_size: episodes of a step.
        records: file of the expert's episodes, for the arm without an environment.
    """
    both = [{"model": str(MODELS / name)} for name in EXPERTS]
    debate = {
        "prompts": world.DEBATE_PROMPTS, "rounds": 2, "tau": 0.2, "temperature": 0.0, "top_p": 1.0, "top_k": 0,
        "repetition_penalty": 1.0, "max_tokens": 8,
    }  # fmt: skip
    recorded = {
        "environment": {
            "name": "recorded",
            "options": {"mode": "teacher_forced", "files": {"train": str(records)}},
            "num_environments": 16,
        },
        "per_device_train_batch_size": batch_size * RECORDED_STEPS,
    }
    sampled = {"sampling": "uniform", "steps_per_trajectory": SAMPLED_STEPS}

    def arm(name: str, title: str, method: str, teachers: Sequence[Any] = both, **settings: Any) -> Arm:
        return Arm(name, title, {"method": method, "teachers": list(teachers), "divergence": "jsd", **settings})

    return [
        arm("opad", "OPAD (debate on live states)", "opad", debate=debate),
        arm("opad_sampled", f"OPAD, {SAMPLED_STEPS} steps an episode", "opad", debate=debate, opad=sampled),
        arm("recorded", "OPAD on recorded expert episodes", "opad", debate=debate, **recorded),
        arm("mt_opd", "MT-OPD (both, no debate)", "mt_opd"),
        arm("opd_bring", "OPD, expert_bring", "opd", both[:1]),
        arm("opd_open", "OPD, expert_open", "opd", both[1:]),
    ]


def write_records(file: Path, count: int) -> None:
    """The house's expert plays; its episodes as conversations."""
    rows = []
    for task in House.tasks("train", **world.OPTIONS, count=count):
        house = House(**world.OPTIONS)
        messages = list(house.reset(seed=0, task=task).messages)
        done = False
        while not done:
            said = house.expert()
            step = house.step(said)
            messages += [said] if step.done else [said, *step.messages]
            done = step.done
        rows.append({"id": task["id"], "data_source": task["type"], "messages": messages})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, rows)


def demo(arguments: Sequence[str] = ()) -> int:
    """Compare and report."""
    options = parser(__doc__, steps=24, learning_rate=1e-3, batch_size=8, test_games=60).parse_args(arguments)
    records = (options.output_dir / "expert_episodes.jsonl").resolve()
    write_records(records, options.train_games)
    return main("OPAD demo", arms(options.batch_size, records), options)
