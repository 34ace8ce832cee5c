"""Tasks of ``lm-eval``: the harness writes prompts, reads answers and aggregates; this project's model answers.

Tasks that generate are sampled as evaluations during training are; tasks that choose compare log-probabilities of the
options under the model.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from opdengine.config.train import TrainConfig
from opdengine.rollout.transformers import TransformersSampler
from opdengine.tools.bench.record import Outcome
from opdengine.training.evaluate import answer_params

PREFIX = "lm_eval"
"""``lm_eval:TASK,TASK`` names any task of the harness."""
TASKS = {
    "aime24": "aime24",
    "aime25": "aime25",
    "gpqa": "gpqa_diamond_cot_zeroshot",
    "ifeval": "ifeval",
    "medqa": "medqa_4options",
    "mmlu": "mmlu",
}
"""Names of ours for the papers' sets -> tasks of the harness."""
INSTALL = "pip install 'opdengine[bench]'"
OWN = {"humaneval": "humaneval", "mbpp": "mbpp_plus"}
"""How the names of tasks begin that would run programs, and what runs them in the sandbox."""


def is_lm_eval(name: str) -> bool:
    """Whether a benchmark is one of this harness."""
    return name in TASKS or name.partition(":")[0] == PREFIX


class LmEval:
    """Tasks of the harness, asked once for every seed.

    Args:
        name: one of :data:`TASKS`, or ``lm_eval:TASK,TASK``.
        config: how answers are sampled.
        limit: take the first so many questions of each task.
        file: a JSON-lines file of the one task's questions, in the layout of its data set.

    Raises:
        ValueError: the harness, a task or its data are missing; nothing has been loaded then.
    """

    def __init__(self, name: str, config: TrainConfig, limit: int | None, file: str | None) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(f"the package lm-eval is missing: {INSTALL}")
        if config.eval_num_generations > 1:
            raise ValueError(
                f"eval_num_generations={config.eval_num_generations} is not possible with lm-eval, which reads one "
                "answer to each question; use --seeds"
            )
        self._config, self._limit = config, limit
        tasks = [TASKS[name]] if name in TASKS else [part for part in name.partition(":")[2].split(",") if part]
        self._tasks = load_tasks(tasks, file)
        self._asked = asked(self._tasks) if file is None else list(self._tasks["tasks"].values())
        if file is not None:
            rehearse(self._asked, file, limit)

    def settings(self) -> dict[str, Any]:
        """What the values depend on besides the model and the seed."""
        sampling = asdict(answer_params(self._config))
        del sampling["seed"]
        digest = hashlib.sha256()
        for name, task in sorted(self._tasks["tasks"].items()):
            docs = [doc for _, doc in task.doc_iterator(rank=0, limit=self._limit, world_size=1)]
            digest.update(json.dumps([name, task.VERSION, docs], sort_keys=True, default=str).encode())
        return {
            "versions": {"lm-eval": metadata.version("lm-eval")},
            "tasks": sorted(self._tasks["tasks"]),
            "fingerprint": digest.hexdigest()[:16],
            "sampling": sampling,
        }

    def run(self, sampler: TransformersSampler, tokenizer: Any, seed: int) -> Outcome:
        """Let the harness ask, and take its metrics."""
        from lm_eval import simple_evaluate

        from opdengine.tools.bench.lm_eval_models import Model

        model = Model(sampler, tokenizer, self._config, seed)
        found = simple_evaluate(model=model, tasks=self._asked, limit=self._limit, apply_chat_template=True)
        assert found is not None
        rows = dict(row for name, metrics in found["results"].items() for row in _rows(name, metrics))
        answers = [
            {"task": name, "id": sample["doc_id"], "answers": sample["filtered_resps"], "texts": sample["resps"]}
            for name, samples in found["samples"].items()
            for sample in samples
        ]
        return Outcome(rows, {"cut": model.cut}, answers)

    def close(self) -> None:
        """Nothing is held."""


def load_tasks(names: Sequence[str], file: str | None) -> Any:
    """Tasks with their questions.

    Raises:
        ValueError: a name is unknown, a task would run programs, or its data cannot be had.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    for noisy in ("lm_eval", "datasets", "absl", "rouge_scorer"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not names:
        raise ValueError(f"name the tasks of lm-eval: opdengine bench {PREFIX}:TASK,TASK")
    manager = _manager()
    for name in names:
        if ours := [own for start, own in OWN.items() if name.startswith(start)]:
            raise ValueError(
                f"the task {name!r} of lm-eval would run programs of the model outside of a sandbox; use opdengine "
                f"bench {ours[0]}"
            )
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(f"lm-eval has no task {name!r}" + (f"; did you mean one of {close}?" if close else ""))
    wanted: list[Any] = list(names)
    if file is not None:
        wanted = [_with_data(names, file)]
    try:
        found = manager.load(wanted)
    except Exception as error:  # of datasets, huggingface_hub and the tasks' own code
        said = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = (
            "correct the file: it holds the rows of the task's data set as JSON lines"
            if file is not None
            else "where the hub cannot be reached, fill its cache elsewhere, or name a file of the rows of the task's "
            "data set with --data FILE; HF_HUB_OFFLINE=0 lets it download"
        )
        raise ValueError(f"the questions of {', '.join(names)} cannot be read: {said}; {remedy}") from error
    for name, task in found["tasks"].items():
        if task.get_config("unsafe_code"):
            raise ValueError(f"the task {name!r} of lm-eval would run programs of the model outside of a sandbox")
    return found


@functools.cache
def _manager() -> Any:
    """The harness's index of its tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _with_data(names: Sequence[str], file: str) -> dict[str, Any]:
    """One task with the rows of a file as every split of its data set."""
    if len(names) != 1:
        raise ValueError(f"--data belongs to one task, not to {len(names)}")
    if not os.path.isfile(file):
        raise ValueError(f"--data {file!r} does not exist")
    splits = {split: os.path.abspath(file) for split in ("train", "validation", "test")}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    return {"group": "opdengine", "task": [{"task": names[0], **data}]}  # settings of a task alone would replace it


def asked(found: Any) -> list[Any]:
    """Tasks and groups as the harness takes them again: a group brings its own."""
    inner = {child for group in found["groups"].values() for child in group.child_names}
    return [each for kind in ("groups", "tasks") for name, each in found[kind].items() if name not in inner]


def rehearse(tasks: list[Any], file: str, limit: int | None) -> None:
    """Let the harness ask and grade with empty answers, which shows whether it can use the rows of a file.

    Raises:
        ValueError: it cannot.
    """
    from lm_eval import simple_evaluate

    from opdengine.tools.bench.lm_eval_models import Silent

    try:
        simple_evaluate(model=Silent(), tasks=tasks, limit=limit, bootstrap_iters=0)
    except Exception as error:  # of the tasks' own code
        raise ValueError(
            f"lm-eval cannot use the rows of {file!r}: {type(error).__name__}: {error}; they need the columns of the "
            "task's data set"
        ) from error


def _rows(name: str, metrics: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Rows of the table: one for every metric of a task or group."""
    rows = []
    for key, value in metrics.items():
        metric, _, way = key.partition(",")
        if not way or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        row = {"value": float(value), "questions": metrics["sample_len"]}
        stderr = metrics.get(f"{metric}_stderr,{way}")
        if isinstance(stderr, (int, float)):
            row["stderr"] = float(stderr)
        rows.append((f"{name} {metric}" + (f" ({way})" if way != "none" else ""), row))
    return rows
