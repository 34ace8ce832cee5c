"""Steps of several methods on however many ranks torchrun started; the first rank writes what happened.

python -m torch.distributed.run --nproc-per-node 2 step_worker.py cases.json out.pt
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks, start
from opdengine.environments.setup import load_tasks
from opdengine.methods import build_method
from opdengine.methods.method import Method
from opdengine.methods.sage_judge import Query, Verdict
from opdengine.models.chat import load_tokenizer
from opdengine.models.sharding import whole, whole_weights
from opdengine.training.build import build_engine
from opdengine.training.diagnostics import gradient_diagnostics
from opdengine.training.token_log import recompute_loss
from opdengine.types import Batch, Prompt, Sample


@contextmanager
def counted_mail() -> Iterator[list[dict[str, Any]]]:
    """What this rank gives the others to gather meanwhile: the sender, the bytes, and whether a sample is within."""
    mail: list[dict[str, Any]] = []
    gather = Ranks.gather

    def counted(self: Ranks, value: Any) -> Any:
        data, frame = pickle.dumps(value), sys._getframe(1)
        while frame.f_code.co_filename.endswith("distributed.py") and frame.f_back is not None:
            frame = frame.f_back
        mail.append({"sender": Path(frame.f_code.co_filename).stem, "bytes": len(data),
                     "sample": b"opdengine.types" in data, "prompt": b"What is" in data})  # fmt: skip
        return gather(self, value)

    Ranks.gather = counted  # type: ignore[method-assign, assignment]
    try:
        yield mail
    finally:
        Ranks.gather = gather  # type: ignore[method-assign]


def drop_the_first(method: Method, count: int) -> None:
    """Have a method drop the samples of the first prompts of every batch."""
    weigh = method.weigh

    def drop(batch: Batch) -> None:
        weigh(batch)
        for sample in batch:
            if int(sample.group) < count:
                sample.drop = "dropped_by_test"

    method.weigh = drop  # type: ignore[method-assign]


class EveryThird:
    """Grades by the characters of the text."""

    def grade(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[SimpleNamespace]:
        return [SimpleNamespace(value=float(sum(text.encode()) % 3 == 0), detail="") for text in texts]

    def counts(self) -> dict[str, float]:
        return {}


async def by_tokens(queries: Sequence[Query], judges: Sequence[Any]) -> list[Verdict]:
    """Verdicts that depend on the tokens of the turn only."""
    kinds = (Verdict("skip", 0.0), Verdict("weak", 0.5), Verdict("strong", 1.0))
    return [kinds[int(turn.token_ids.sum()) % 3] for _, _, turn, _ in queries]


def run(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Two steps: gradients of the first, weights after both, metrics, and what was sampled and kept."""
    config = from_mapping(TrainConfig, case["config"])
    method = build_method(config)
    if case.get("drop_first"):
        drop_the_first(method, case["drop_first"])
    torch.manual_seed(0)
    engine = build_engine(config, method, load_tokenizer(config.model), ranks=ranks)
    shorten = engine.sampler.generate

    def uneven(requests: Any, params: Any) -> Any:
        """Lengths that differ a lot between prompts, fixed by the request's seed."""
        return [
            [replace(c, token_ids=c.token_ids[: r.seed % 7 + 1], logprobs=c.logprobs[: r.seed % 7 + 1]) for c in row]
            for r, row in zip(requests, shorten(requests, params), strict=True)
        ]

    engine.sampler.generate = uneven
    if method.needs_reward:
        engine.grader = EveryThird()  # type: ignore[assignment]
    if config.method == "sage_opd":
        method.judge.ask = by_tokens  # type: ignore[attr-defined]
    gradients: dict[str, torch.Tensor] = {}
    take = engine._optimizer_step

    def note(loss: float, norm: float) -> dict[str, float]:
        if not gradients:
            named = engine.student.model.named_parameters()
            gradients.update({n: whole(p.grad).clone().cpu() for n, p in named if p.grad is not None})
        return take(loss, norm)

    engine._optimizer_step = note  # type: ignore[method-assign]
    tasks = load_tasks(config.environment, "train") if config.environment.name else load_prompts(config.train_data)
    prompts = tasks.prompts
    engine.diagnostics = gradient_diagnostics(method, prompts)
    results, sent = [], []
    for step in range(2):
        batch = [prompts[(step * case["prompts"] + i) % len(prompts)] for i in range(case["prompts"])]
        with counted_mail() as mail:
            results.append(asyncio.run(engine.step(batch)))
        tokens = sum(len(sample.token_ids) for sample in results[-1].samples)
        sent.append({"mail": mail, "samples": len(results[-1].samples), "tokens": tokens})
    if engine.episodes is not None:
        engine.episodes.close()
    return {
        "gradients": gradients,
        "weights": {name: value.clone() for name, value in whole_weights(engine.student.model, host=True)},
        "device": str(engine.student.device),
        "metrics": [r.metrics for r in results],
        "recomputed": [recompute_loss(arrays for _, arrays in r.tokens) for r in results],
        "head_rows": ranks.gather(engine.student.head_rows.weight.shape[0] if engine.student.has_split_head else 0),
        "sent": [part for step in sent for part in ranks.gather(step)],
        "rollouts": [ranks.join([described(sample) for sample in r.samples]) for r in results],
    }


def described(sample: Sample) -> tuple[str, str, tuple[int, ...]]:
    return sample.id, sample.group, tuple(np.asarray(sample.target_ids).tolist())


def main(cases: str, out: str) -> None:
    with start() as ranks:
        found = {name: run(case, ranks) for name, case in json.loads(Path(cases).read_text()).items()}
        if ranks.is_first:
            torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
