"""What a method may ask to be measured of student and teacher together, against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_helpers import full_logprobs, make_config, make_engine, make_samples

from opdengine.data.prompts import load_prompts
from opdengine.types import Batch

Models = dict[str, str]


def test_divergence_and_agreement_of_every_token_and_teacher(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside the student's own measures, in several pieces; tokens of turns without weight have 0."""
    monkeypatch.setattr("opdengine.training.scoring.MOST_ROWS", 8)
    engine = make_engine(make_config(models, prompt_file, tmp_path))
    engine.method.needs = frozenset({"teacher_kl", "teacher_agreement", "student_entropy"})
    samples = make_samples(engine, load_prompts([prompt_file]).prompts[:3])
    for sample in samples:
        own = full_logprobs(models["student"], sample.token_ids, sample.target_positions, engine.vocab_size)
        entropy = -(own.exp() * own).sum(-1)
        np.testing.assert_allclose(sample.student_entropy, entropy, rtol=1e-4)
        assert sample.teacher_kl is not None and sample.teacher_agreement is not None
        for k, context in enumerate(sample.contexts):
            their = full_logprobs(
                models[context.teacher], context.token_ids, context.target_positions, engine.vocab_size
            )
            kl = (own.exp() * (own - their)).sum(-1)
            np.testing.assert_allclose(sample.teacher_kl[:, k], kl, rtol=1e-3)
            same = own.argmax(-1) == their.argmax(-1)
            assert sample.teacher_agreement[:, k].tolist() == same.float().tolist()
    silent = samples[0]
    silent.turn_weight = np.zeros(len(silent.turns), dtype=np.float32)
    engine.measure(Batch(samples=[silent]))
    assert silent.teacher_kl is not None and not silent.teacher_kl.any()
