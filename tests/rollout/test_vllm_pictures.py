"""Prompts with pictures in vLLM: the tokens and the log-probs are the trainer's, also after updates.

The model is shaped like Idefics 3, the one family whose code in vLLM 0.32 is here without torchvision.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("engine", "vision")]

from engine_helpers import make_config, make_engine
from vision_helpers import chat, make_picture, make_seeing

from opdengine.data.prompts import load_prompts
from opdengine.models.backbone import Backbone, load_model
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.models.policy import policy
from opdengine.models.vision_tower import tower
from opdengine.rollout.vllm.engine import InvalidRequestError
from opdengine.rollout.vllm.opening import open_child
from opdengine.types import Completion, Encoded, Request, SamplingParams

pytestmark = pytest.mark.vllm
KIND = "idefics3"
TOWER = ("model.vision_model.", "model.connector.")


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_seeing(tmp_path_factory.mktemp("seeing") / KIND, KIND, tiny.make_tokenizer, hidden=128)


def shake(model: Any, part: str, seed: int) -> None:
    """Move the weights whose names hold ``part``."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name and parameter.dim() == 2:
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))


def worst_gap(student: Backbone, requests: Sequence[Request], found: Sequence[Sequence[Completion]]) -> float:
    """Largest difference of the sampler's log-probs and the trainer's, over completions without image tokens."""
    gaps = []
    for request, samples in zip(requests, found, strict=True):
        for sample in samples:
            ids = np.array([*request.token_ids, *sample.token_ids])
            if student.vision is not None and not student.vision.matches(ids, request.images):
                continue
            (states,) = student.score([ids], [np.arange(len(request.token_ids), len(ids))], [request.images])
            with torch.no_grad():
                own = student.head.logits(states).float().log_softmax(-1).numpy()
            gaps.append(np.abs(own[np.arange(len(states)), sample.token_ids] - sample.logprobs).max())
    assert len(gaps) >= 5
    return float(max(gaps))


def test_log_probs_are_the_trainers_after_every_update(folder: str) -> None:
    """Of the language model, and of a tower that is trained: what vLLM keeps of a picture is forgotten."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype="float32", sees=True)
    student = Backbone(model, vision=tokenizer.vision)
    chats = [chat(make_picture(0, 90, 50), "b"), chat("word"), chat("x", make_picture(1, 30, 70), make_picture(2), "y")]
    requests = [Request(str(i), encode_chat(tokenizer, messages), seed=i) for i, messages in enumerate(chats)]
    params = SamplingParams(max_tokens=7, n=2, seed=3)
    options = {"dtype": "float32", "max_model_len": 400, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}
    with open_child(folder, tokenizer, sees=True, **options) as sampler:
        for version, part in enumerate(("nothing", "text_model", "vision_model", "connector")):
            before = sampler.generate(requests, params) if version else []
            shake(model, part, version)
            sampler.load_policy(version, *policy(model))
            if before:
                assert worst_gap(student, requests, before) > 0.01
            assert worst_gap(student, requests, sampler.generate(requests, params)) < 1e-4
        first = requests[0]
        other = Request("o", Encoded([*first.token_ids, 5], first.images, first.text))
        with pytest.raises(InvalidRequestError, match=r"vLLM reads a prompt with pictures as \d+ tokens, the trainer"):
            sampler.generate([other], params)
        assert worst_gap(student, requests, sampler.generate(requests, params)) < 1e-4


def test_a_run_sends_the_language_model_alone(folder: str, tmp_path: Path) -> None:
    """The tower is frozen; the engine has it from the checkpoint. Sampler and trainer agree in every step."""
    make_picture(0, 56, 40, path=str(tmp_path / "0.png"))
    make_picture(1, 70, 90, path=str(tmp_path / "1.png"))
    rows = [{"prompt": "What?", "images": ["0.png"]}, {"prompt": "<image> or <image>?", "images": ["1.png", "0.png"]},
            {"prompt": "Say a word."}]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        {"student": folder, "big": folder, "small": folder}, str(data), tmp_path / "run",
        teachers=[{"model": folder}], method="opd", use_vllm=True, num_generations=4, temperature=1.0,
        max_prompt_length=300, learning_rate=1e-2, max_logprob_difference=1e-3,
    )  # fmt: skip
    engine = make_engine(config)
    names = [f"{name}." for name, _ in tower(engine.student.model)]
    assert tuple(names) == TOWER
    shake(engine.teachers[0].backbone.model, "text_model", 1)  # type: ignore[attr-defined]
    try:
        for step in range(2):
            asyncio.run(engine.sync())
            result = asyncio.run(engine.step(load_prompts([str(data)]).prompts, step))
            assert result.metrics["sampling/logprob_difference_max"] < 1e-3
            assert {len(sample.images) for sample in result.samples if not sample.drop} == {0, 1, 2}
        sent = set(engine.sampler._policy.names)  # type: ignore[attr-defined]
        assert sent and not any(name.startswith(TOWER) for name in sent)
    finally:
        engine.sampler.close()  # type: ignore[attr-defined]
