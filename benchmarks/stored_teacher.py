"""A teacher that is asked in every epoch beside one whose judgement is read from disk: seconds, bytes, and the loss.

    python benchmarks/stored_teacher.py --model models/smollm2 [--save] [--prompts 8] [--tokens 32] [--rounds 3]

The student is the model in float32, the teacher the same with noise in every matrix; the given answers are passages of
the LICENSE behind the prompts of ``real_rows.py``, and the run is ``gkd`` with ``lmbda: 0``. All ways take turns on the
same batch and the same student, which no update moves: their losses can be compared. Seconds are processor time, of
every way the fastest of the rounds; a first one is not counted. ``--save`` writes
``benchmarks/results/real/stored_teacher.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from conftest import real_model_parser, save_results
from real_rows import NOISE, PROMPTS

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.methods import build_method
from opdengine.models.chat import load_tokenizer
from opdengine.teachers.stored import identity_of, open_stored
from opdengine.training.build import build_engine

WAYS = {"asked": None, "stored": "auto", "stored bfloat16": "bfloat16"}


@torch.no_grad()
def prepare(folder: str, root: Path, prompts: int, tokens: int) -> None:
    """Write the teacher and the data."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    for matrix in model.model.layers.parameters():
        if matrix.dim() == 2:
            matrix.add_(torch.randn_like(matrix), alpha=NOISE * float(matrix.std()))
    model.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    ids = tokenizer.encode((ROOT / "LICENSE").read_text())
    passages = [tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(prompts)]
    rows = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS[:prompts], passages, strict=True)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All ways in turn."""
    prepare(options.model, root, options.prompts, options.tokens)
    config = from_mapping(
        TrainConfig,
        {
            "model": options.model, "dtype": "float32", "method": "gkd", "gkd": {"lmbda": 0.0},
            "teachers": [{"model": str(root / "teacher"), "name": "t"}], "train_data": [str(root / "data.jsonl")],
            "output_dir": str(root / "run"), "per_device_train_batch_size": options.prompts,
            "max_completion_length": 4 * options.tokens,
        },
    )  # fmt: skip
    engine = build_engine(config, build_method(config), load_tokenizer(options.model))
    engine._optimizer_step = lambda loss, norm: {"loss": loss}  # type: ignore[method-assign]
    prompts, (plain,) = load_prompts(config.train_data).prompts, engine.teachers
    figures: dict[str, Any] = {way: {"score_seconds": [], "rest_seconds": []} for way in WAYS}
    for number in range(options.rounds + 1):
        for way, dtype in WAYS.items():
            teacher: Any = plain
            if dtype is not None:  # opened anew, as a new run would
                settings = replace(config.teachers[0], stored=str(root / "store"), stored_dtype=dtype)
                plain.config = settings  # type: ignore[attr-defined]
                teacher = open_stored(plain, identity_of(settings, plain.tokenizer))  # type: ignore[attr-defined]
            batch = asyncio.run(engine.prepare(prompts, 0))
            engine.teachers = engine.method.teachers = [teacher]
            begin = time.process_time()
            asyncio.run(engine.score(batch))
            scored = time.process_time()
            engine.measure(batch)
            engine.weigh(batch)
            targets = sum(len(sample.target_ids) for sample in batch)
            figures[way]["loss"] = engine.update(batch).metrics["loss"]
            if number:
                figures[way]["score_seconds"].append(scored - begin)
                figures[way]["rest_seconds"].append(time.process_time() - scored)
            elif dtype is not None:
                figures[way] |= {"first_seconds": scored - begin, "bytes": written(teacher.store.folder)}
    for figure in figures.values():
        figure |= {key: min(figure[key]) for key in ("score_seconds", "rest_seconds")}
    return {"prompts": len(prompts), "targets": targets, "ways": figures}


def written(folder: Path) -> int:
    """Bytes of judgements and index, without the head."""
    return sum(file.stat().st_size for ending in ("data", "index") for file in folder.glob(f"*.{ending}"))


def main(arguments: Sequence[str]) -> int:
    parser = real_model_parser(__doc__, prompts=8, tokens=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        results = run(options, Path(root))
    print(json.dumps(results, indent=1))
    if options.save:
        save_results(ROOT / "benchmarks" / "results" / "real" / "stored_teacher.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
