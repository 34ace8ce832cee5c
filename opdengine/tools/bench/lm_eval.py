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
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any

import torch

from opdengine.config.train import TrainConfig
from opdengine.models.batching import forward_options
from opdengine.models.rendering import thought_opening
from opdengine.models.thoughts import answer_part
from opdengine.rollout.transformers import TransformersSampler
from opdengine.tools.bench.record import Outcome
from opdengine.training.evaluate import answer_params
from opdengine.types import Request

logger = logging.getLogger(__name__)

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

        model = adapter()(sampler, tokenizer, self._config, seed)
        found = simple_evaluate(model=model, tasks=self._asked, limit=self._limit, apply_chat_template=True)
        assert found is not None
        counts = {name: each["effective"] for name, each in found["n-samples"].items()}
        rows = {
            title: row
            for name, metrics in found["results"].items()
            for title, row in _rows(name, metrics, counts.get(name, sum(counts.values())))
        }
        answers = [
            {"task": name, "id": sample["doc_id"], "answers": sample["filtered_resps"], "texts": sample["resps"]}
            for name, samples in found["samples"].items()
            for sample in samples
        ]
        return Outcome(rows, {"cut": model.cut}, json.loads(json.dumps(answers, default=str)))

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
    from lm_eval.api.model import LM

    class Silent(LM):  # type: ignore[misc]
        def generate_until(self, requests: list[Any]) -> list[str]:
            return [""] * len(requests)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [0.0] * len(requests)

    try:
        simple_evaluate(model=Silent(), tasks=tasks, limit=limit, bootstrap_iters=0)
    except Exception as error:  # of the tasks' own code
        raise ValueError(
            f"lm-eval cannot use the rows of {file!r}: {type(error).__name__}: {error}; they need the columns of the "
            "task's data set"
        ) from error


def _rows(name: str, metrics: dict[str, Any], count: int) -> list[tuple[str, dict[str, float]]]:
    """Rows of the table: one for every metric of a task or group."""
    rows = []
    for key, value in metrics.items():
        metric, _, way = key.partition(",")
        if not way or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        row = {"value": float(value), "questions": count}
        stderr = metrics.get(f"{metric}_stderr,{way}")
        if isinstance(stderr, (int, float)):
            row["stderr"] = float(stderr)
        rows.append((f"{name} {metric}" + (f" ({way})" if way != "none" else ""), row))
    return rows


def adapter() -> Callable[..., Any]:
    """The class of our models for the harness, whose base is only there when it is installed."""
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):  # type: ignore[misc]
        """A loaded model that answers the harness."""

        def __init__(self, sampler: TransformersSampler, tokenizer: Any, config: TrainConfig, seed: int) -> None:
            super().__init__()
            self.sampler, self.tokenizer = sampler, tokenizer
            self.params = replace(answer_params(config), seed=seed)
            self.template = dict(config.chat_template_kwargs)
            self.opening = thought_opening(tokenizer, config.chat_template_kwargs)
            self.cut = 0
            """Prompts whose beginning did not fit the window."""

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            more = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **more, **self.template))

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return list(self.tokenizer.encode(string, add_special_tokens=False))  # the template has them

        def fit(self, ids: list[int], room: int) -> list[int]:
            """The end of a prompt that leaves ``room`` in the window; counted where something is lost."""
            window = self.sampler.window
            if window is None or len(ids) + room <= window:
                return ids
            if room >= window:
                raise ValueError(
                    f"answers of {room} tokens do not fit the window of {window}; lower max_completion_length"
                )
            self.cut += 1
            if self.cut == 1:
                logger.warning("WARNING: prompts longer than the model's window of %d lose their beginning", window)
            return ids[room - window :]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers = [""] * len(requests)
            for until, places in by_stop(requests).items():
                params = replace(self.params, stop=until)
                asked = [
                    Request(str(i), self.fit(self.tok_encode(requests[i].args[0]), params.max_tokens), seed=i)
                    for i in places
                ]
                for i, (answer,) in zip(places, self.sampler.generate(asked, params), strict=True):
                    text = answer_part(self.opening + answer.text) or ""
                    for stop in until:
                        text = text.partition(stop)[0]
                    answers[i] = text
            return answers

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = []
            known: list[int] = []
            last = torch.empty(0)
            for _, context, continuation in requests:
                ids = self.fit(list(context), len(continuation))
                if len(continuation) > 1 or ids != known:
                    rows = self.logprobs(ids + list(continuation[:-1]))[len(ids) - 1 :]
                    known, last = ids, rows[:1]
                else:
                    rows = last
                targets = torch.tensor(continuation, device=rows.device)
                value = float(rows.gather(1, targets[:, None]).sum())
                found.append((value, bool((rows.argmax(-1) == targets).all())))
            return found

        def logprobs(self, ids: list[int]) -> torch.Tensor:
            """[T, V] log-probabilities of what follows each token."""
            sampler = self.sampler
            with torch.no_grad(), torch.autocast(sampler.device.type, torch.bfloat16, enabled=sampler.bf16):
                given = torch.tensor([ids], device=sampler.device)
                out = sampler.model(input_ids=given, use_cache=False, **forward_options(sampler.model))
            logits: torch.Tensor = out.logits[0, :, : sampler.vocabulary]
            return logits.float().log_softmax(-1)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise ValueError("tasks of perplexity are not run; choose one that generates or chooses")

    return Model


def by_stop(requests: Sequence[Any]) -> dict[tuple[str, ...], list[int]]:
    """Places of requests by the texts that end their answers."""
    found: dict[tuple[str, ...], list[int]] = {}
    for i, request in enumerate(requests):
        until = request.args[1].get("until") or ()
        texts = (until,) if isinstance(until, str) else tuple(until)
        found.setdefault(tuple(text for text in texts if text), []).append(i)
    return found
