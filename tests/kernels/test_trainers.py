"""The fused loss in ``transformers.Trainer``, and behind the signatures of ms-swift and verl."""

from __future__ import annotations

import pytest
import torch
from causal_lm_cases import VOCAB, make
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from opd_kernels import LMHead
from opd_kernels.adapters import LigerFusedLinearJSDLoss
from opd_kernels.trainers import TrainerLoss, verl_forward_kl_topk


def examples(count=8):
    g = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCAB, (5 + i % 4,), generator=g)} for i in range(count)]


def collate(rows):
    """Padded on the right; the first two tokens are the prompt."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])], mask[i, : len(row["input_ids"])] = row["input_ids"], 1
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def jsd(student, teacher, beta=0.5):
    """[N] from logits."""
    p, q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


class PlainTrainer(Trainer):
    """The same loss from logits."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        counted = labels != -100
        with torch.no_grad():
            other = self.teacher(**inputs).logits[:, :-1][counted]
        loss = jsd(model(**inputs).logits[:, :-1][counted], other).sum()
        loss = loss / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            **options,
        },
    )


def trained(folder, fused, lora=False, **options):
    """Losses and trained parameters, and the loss of an evaluation."""
    student, teacher = make(dtype=torch.float32), make(seed=5, dtype=torch.float32)
    if lora:
        torch.manual_seed(2)
        student = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    given = {"args": arguments(folder, **options), "train_dataset": examples(), "eval_dataset": examples(4)}
    if fused:
        loss = TrainerLoss(student, [teacher], divergence="jsd")
        trainer = Trainer(student, data_collator=loss.collator(collate), compute_loss_func=loss, **given)
    else:
        trainer = PlainTrainer(student, data_collator=collate, **given)
        trainer.teacher, trainer.loss_is_scaled_for_ga = teacher, True
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, trainer.evaluate()["eval_loss"], [p.detach() for p in student.parameters()], student


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"lora": True, "gradient_accumulation_steps": 2},
        {"bf16": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulation", "lora", "bf16", "compile"],
)
def test_a_trainer_trains_alike(tmp_path, options):
    ours, theirs = trained(tmp_path, True, **options), trained(tmp_path, False, **options)
    tolerance = 3e-2 if options.get("bf16") else 1e-4
    assert len(ours[0]) == options.get("max_steps", 3) and ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1] == pytest.approx(theirs[1], rel=tolerance)
    if not options.get("bf16"):
        for a, b in zip(ours[2], theirs[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    ids = torch.tensor([[5, 6, 7]])
    student = ours[3].eval()
    assert student.generate(input_ids=ids, max_new_tokens=3).shape[1] >= 4  # as before
    assert student(input_ids=ids).logits.shape == (1, 3, VOCAB)


def test_a_collator_of_the_loss_is_needed():
    student = make(dtype=torch.float32)
    loss = TrainerLoss(student, [make(seed=5, dtype=torch.float32)])
    batch = collate(examples(2))
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match=r"data_collator=loss\.collator"):
        loss(student(**batch), labels)
    with pytest.raises(ValueError, match=r"\['reduction'\] cannot be set here"):
        TrainerLoss(student, [], reduction="none")
    with pytest.raises(ValueError, match=r"\['vocab_sample'\] cannot be set here: each call needs a seed of its own"):
        TrainerLoss(student, [], vocab_sample=0.1)


def test_a_batch_without_a_token_that_counts():
    """A prompt that fills the whole length; with several processes it is still part of the step."""
    student = make(dtype=torch.float32)
    loss = TrainerLoss(student, [make(seed=5, dtype=torch.float32)])
    batch = loss.collator(collate)(examples(2))
    batch["fused_labels"] = batch.pop("labels").fill_(-100)
    for items in (None, torch.tensor(7), torch.tensor(0), 0):  # of the whole step
        student.zero_grad()
        value = loss(student(**batch), num_items_in_batch=items)
        value.backward()
        assert value == 0 and all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_a_failed_pass_leaves_the_student_as_it_was():
    student = make(dtype=torch.float32)
    loss = TrainerLoss(student, [make(seed=5, dtype=torch.float32)])
    batch = loss.collator(collate)(examples(2))
    batch.pop("labels")
    handle = student.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        student(**batch)
    handle.remove()
    assert student(input_ids=batch["input_ids"]).logits.shape[-1] == VOCAB
    assert student(**batch)["loss"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_call_of_ms_swift(beta):
    """Its ``GKDTrainer`` (4.6) builds and calls Liger's loss like this; its loss from logits is ``jsd_loss``."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 6, generator=g, dtype=torch.float64).requires_grad_()
    other = torch.randn(2, 5, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=g, dtype=torch.float64).requires_grad_()
    other_weight = torch.randn(11, 8, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 11, (2, 5), generator=g)
    labels[0, :2] = -100
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, ignore_index=-100, temperature=0.9, compiled=False
    )
    loss = module(
        student_input=states,
        student_weight=weight,
        teacher_input=other,
        teacher_weight=other_weight,
        true_labels=labels,
        student_bias=None,
        teacher_bias=None,
    )
    rows = labels != -100
    p = (states[rows] @ weight.T / 0.9).log_softmax(-1)
    q = (other[rows] @ other_weight.T / 0.9).log_softmax(-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    m = torch.logsumexp(torch.stack([p + torch.tensor(1 - beta).log(), q + torch.tensor(beta).log()]), 0)
    want = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta, beta * kl(q, m) + (1 - beta) * kl(p, m)).sum() / rows.sum()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0.0)
    ours, theirs = (torch.autograd.grad(x, (states, weight)) for x in (loss, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def verl_from_logits(student_logits, teacher_logprobs, ids, clamp):
    """verl 0.9.1, ``compute_forward_kl_topk`` without its diagnostics."""
    student = torch.gather(student_logits.log_softmax(-1), -1, ids)
    masses = student.exp().sum(-1), teacher_logprobs.exp().sum(-1)
    if clamp is not None:
        student, teacher_logprobs = student.clamp_min(clamp), teacher_logprobs.clamp_min(clamp)
    return (teacher_logprobs.exp() * (teacher_logprobs - student)).sum(-1), *masses


@pytest.mark.parametrize("clamp", [None, -2.0])
@pytest.mark.parametrize("nested", [True, False])
def test_the_call_of_verl(clamp, nested):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(1, 7, 6, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 6, generator=g, dtype=torch.float64).requires_grad_()
    teacher, ids = torch.randn(1, 7, 11, generator=g, dtype=torch.float64).log_softmax(-1).topk(4)
    want = verl_from_logits(states @ weight.T / 0.8, teacher, ids, clamp)
    if nested:
        offsets = torch.tensor([0, 3, 7])
        teacher, ids = (torch.nested.nested_tensor_from_jagged(t[0], offsets) for t in (teacher, ids))
    got = verl_forward_kl_topk(states, LMHead(weight), teacher, ids, temperature=0.8, log_prob_min_clamp=clamp)
    assert list(got) == ["distillation_losses", "student_mass", "teacher_mass"]
    for a, b in zip(got.values(), want, strict=True):
        torch.testing.assert_close(a, b)
    ours, theirs = (torch.autograd.grad(x.sum(), (states, weight)) for x in (got["distillation_losses"], want[0]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="are not of the same tokens"):
        verl_forward_kl_topk(states[:, :5], LMHead(weight), teacher, ids)
