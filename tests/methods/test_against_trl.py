"""SDFT, SDPO, OPSD and GKD: their losses are those of TRL on the same tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_config, make_engine, make_samples
from self_taught_helpers import REWARDS, config_of, graded, our_loss
from transformers import AutoModelForCausalLM

from opdengine.data.prompts import load_prompts
from opdengine.methods.privileged import Privileged
from opdengine.methods.sdft import TEMPLATE
from opdengine.types import Batch, Prompt, Sample

Models = dict[str, str]

trl = pytest.importorskip("trl.experimental.sdft.sdft_trainer")
trl_gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
trl_sdpo = pytest.importorskip("trl.experimental.sdpo.sdpo_trainer")


def logits(path: str, ids: np.ndarray, start: int) -> torch.Tensor:
    """float64 [1, T, V]: the logits that predict ``ids[start:]``."""
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None]).logits[:, start - 1 : -1]


def trainer(**arguments: Any) -> Any:
    """As much of TRL's trainer as its losses look at."""
    args = SimpleNamespace(distillation_is_clip=None, distillation_topk=None, distillation_add_tail=False, **arguments)
    return SimpleNamespace(
        args=args, accelerator=SimpleNamespace(gather=lambda x: x), _metrics={"eval": {}},
        _log_self_distillation_metric=lambda *_: None,
    )  # fmt: skip


def trl_loss(samples: list[Sample], student: str, teacher: str, skip: int = 0, **arguments: Any) -> float:
    """The mean over rollouts of TRL's own loss of each; one without a context counts as 0."""
    losses = []
    for sample in samples:
        first = int(sample.target_positions[0])
        if not sample.contexts:
            losses.append(0.0)
            continue
        context = sample.contexts[0]
        mask = torch.ones(1, len(sample.target_ids))
        mask[:, :skip] = 0
        given = trl.DistillationLogits(
            torch.from_numpy(sample.target_ids)[None], mask, logits(student, sample.token_ids, first),
            logits(teacher, context.token_ids, int(context.target_positions[0])),
        )  # fmt: skip
        model = SimpleNamespace(training=False)
        loss = trl.SDFTTrainer._compute_self_distillation_loss(trainer(**arguments), model, {}, given)
        losses.append(float(loss))
    return float(np.mean(losses))


# ------------------------------------------------------------------------------------------------ against TRL


@pytest.mark.parametrize(
    ("alpha", "divergence"),
    [(0.0, {"divergence": "forward_kl"}), (1.0, {"divergence": "reverse_kl"}),
     (0.3, {"divergence": "jsd", "jsd_beta": 0.3})],
)  # fmt: skip
@pytest.mark.parametrize(("method", "skip"), [("sdft", 0), ("sdft", 2), ("opsd", 0)])
def test_the_loss_is_trls(
    models: Models, shown_file: str, tmp_path: Path, alpha: float, divergence: dict[str, Any], method: str, skip: int
) -> None:
    sdft = {"num_loss_tokens_to_skip": skip}
    config = config_of(
        models, shown_file, tmp_path, method, loss_normalization="sequence", sdft=sdft, **divergence
    )  # fmt: skip
    engine = make_engine(config)
    samples = make_samples(engine, load_prompts([shown_file]).prompts[:4])
    theirs = trl_loss(
        samples, models["student"], models["student"], skip, distillation_mode="full_logits", distillation_alpha=alpha
    )
    assert theirs > 1e-3
    assert our_loss(engine, samples) == pytest.approx(theirs, rel=1e-5)


def test_the_prompt_of_the_teacher_is_trls(shown_file: str) -> None:
    prompts = load_prompts([shown_file]).prompts
    args = SimpleNamespace(args=SimpleNamespace(teacher_prompt_template=TEMPLATE))
    builder = trl.DemonstrationTeacherContextBuilder(args)
    context: Any
    for context in ("a way", [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], 7):
        prompt = Prompt(
            "1", ({"role": "system", "content": "s"}, *prompts[0].messages), extra={"privileged_context": context}
        )
        theirs = builder._compose_teacher_prompt(list(prompt.messages), context)
        assert [dict(m) for m in Privileged(TEMPLATE)(prompt).messages] == theirs


@pytest.mark.parametrize(
    ("weight", "mode", "alpha", "settings"),
    [(1.0, "sampled_token", 1.0, {}), (0.25, "sampled_token", 1.0, {}), (0.0, "sampled_token", 1.0, {}),
     (0.25, "full_logits", 0.5, {"divergence": "jsd", "advantage": {"kl_mode": "full_vocab"}})],
)  # fmt: skip
def test_sdpos_loss_is_trls(
    models: Models, shown_file: str, tmp_path: Path, weight: float, mode: str, alpha: float, settings: dict[str, Any]
) -> None:
    sdpo = {"distillation_weight": weight}
    config = config_of(models, shown_file, tmp_path, "sdpo", loss_normalization="sequence", sdpo=sdpo, **settings)
    engine = make_engine(config)
    samples = graded(engine, load_prompts([shown_file]).prompts[:2], REWARDS)
    assert [bool(s.contexts) for s in samples] == [False, True, True, True, False, False, False, False]
    distilled = trl_loss(
        samples, models["student"], models["student"], distillation_mode=mode, distillation_alpha=alpha
    )
    rewards = torch.tensor(REWARDS)
    mean = rewards.view(-1, 4).mean(1).repeat_interleave(4)
    std = rewards.view(-1, 4).std(1).repeat_interleave(4)
    given = (rewards - mean) / (std + 1e-4)
    policy = []
    for sample, advantage in zip(samples, given, strict=True):
        first = int(sample.target_positions[0])
        inputs = {
            "completion_ids": torch.from_numpy(sample.target_ids)[None], "advantages": advantage[None],
            "completion_mask": torch.ones(1, len(sample.target_ids)),
        }  # fmt: skip
        mock = trainer()
        mock._metrics = {"eval": {"self_distillation/policy_loss": []}}
        mock.model = SimpleNamespace(training=False)
        mock.importance_sampling_level, mock.epsilon_low, mock.epsilon_high, mock.loss_type = "token", 0.2, 0.2, "grpo"
        own = logits(models["student"], sample.token_ids, first).requires_grad_()
        loss = trl_sdpo.SDPOTrainer._compute_policy_loss(mock, inputs, own)
        (gradient,) = torch.autograd.grad(loss, own)
        # The surrogate's value is -A whatever the policy; its gradient is what counts: that of -A log p(y).
        log_p = own.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])
        (expected,) = torch.autograd.grad(-(advantage * log_p).mean(), own)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
        policy.append(-(float(advantage) * float(log_p.detach().mean())))
    expected_loss = weight * distilled + (1 - weight) * float(np.mean(policy))
    assert our_loss(engine, samples) == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("clip", [1.2, 1.02])
def test_the_divergence_of_older_rollouts_is_weighed_as_in_trl(
    models: Models, shown_file: str, tmp_path: Path, clip: float
) -> None:
    """Ratios below and above the clip; the student has moved since it sampled."""
    config = config_of(models, shown_file, tmp_path, "sdft", loss_normalization="sequence", distillation_is_clip=clip)
    engine = make_engine(config)
    samples = make_samples(engine, load_prompts([shown_file]).prompts[:4])
    assert all((s.policy_logratio == 0).all() and (s.kl_weight == 1).all() for s in samples)
    for parameter in engine.student.model.parameters():
        parameter.data *= 1.15
    engine.version = 1
    engine.student.model.save_pretrained(tmp_path / "moved")
    batch = Batch(samples=samples)
    engine.measure(batch)
    engine.weigh(batch)
    losses, seen = [], []
    for sample in samples:
        context, first = sample.contexts[0], int(sample.target_positions[0])
        own = logits(str(tmp_path / "moved"), sample.token_ids, first)
        given = trl.DistillationLogits(
            torch.from_numpy(sample.target_ids)[None], torch.ones(1, len(sample.target_ids)), own,
            logits(models["student"], context.token_ids, int(context.target_positions[0])),
        )  # fmt: skip
        mock = trainer(distillation_mode="full_logits", distillation_alpha=1.0)
        mock.args.distillation_is_clip = clip
        old = {"old_per_token_logps": torch.from_numpy(sample.sampler_logprob)[None].double()}
        model = SimpleNamespace(training=False)
        losses.append(float(trl.SDFTTrainer._compute_self_distillation_loss(mock, model, old, given)))
        now = own.log_softmax(-1).gather(2, given.completion_ids[..., None])[..., 0]
        seen.append((now - old["old_per_token_logps"]).exp())
    assert min(s.min() for s in seen) < clip < max(s.max() for s in seen)
    assert our_loss(engine, samples) == pytest.approx(float(np.mean(losses)), rel=1e-3)


@pytest.mark.parametrize(
    ("beta", "divergence"),
    [(0.0, {"divergence": "forward_kl"}), (1.0, {"divergence": "reverse_kl"}),
     (0.3, {"divergence": "jsd", "jsd_beta": 0.3})],
)  # fmt: skip
@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_a_mixtures_loss_is_trls(
    models: Models, shown_file: str, tmp_path: Path, beta: float, divergence: dict[str, Any], lmbda: float
) -> None:
    """Its trainer's own loss of one padded batch of the same sequences, the student's and those of the data."""
    settings = {"lmbda": lmbda, "completion_column": "privileged_context"}
    config = make_config(
        models, shown_file, tmp_path, method="gkd", teachers=[{"model": models["big"]}], gkd=settings, **divergence
    )
    engine = make_engine(config)
    samples = make_samples(engine, load_prompts([shown_file]).prompts)
    given = sum(bool(sample.info.get("given")) for sample in samples)
    assert given == len(samples) if lmbda == 0 else 0 < given < len(samples)
    longest = max(len(sample.token_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.token_ids)] = torch.from_numpy(sample.token_ids)
        mask[row, : len(sample.token_ids)] = 1
        labels[row, torch.from_numpy(sample.target_positions)] = torch.from_numpy(sample.target_ids)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models[name]).double().eval() for name in ("student", "big")
    )
    # Rows of the head beyond the tokenizer's ids are no part of our distributions.
    for model in (student, teacher):
        model.register_forward_hook(lambda _, __, out: type(out)(logits=out.logits[..., : engine.vocab_size]))
    mock = SimpleNamespace(
        teacher_model=teacher, beta=beta, generalized_jsd_loss=trl_gkd.GKDTrainer.generalized_jsd_loss
    )
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        theirs = float(trl_gkd.GKDTrainer.compute_loss(mock, student, inputs))
    assert theirs > 1e-3
    assert our_loss(engine, samples) == pytest.approx(theirs, rel=1e-5)
