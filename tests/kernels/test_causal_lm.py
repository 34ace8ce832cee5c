"""Hidden states and heads of wrapped models: losses and gradients are those of their plain logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from causal_lm_cases import CONFIGS, assert_same, batch, counted, fused_loss, gradients, make, plain_loss
from peft import LoraConfig, get_peft_model
from ranks_helpers import in_processes
from torch import nn

from opd_kernels import LMHead, linear_divergence
from opd_kernels.causal_lm import in_place_of_head, teacher_head

SCRIPT = Path(__file__).with_name("causal_lm_cases.py")
TEACHER = "plain"


def both(model, *, teacher=None, tolerance=1e-9):
    """Compare loss and gradients with those of the logits."""
    inputs, teacher = batch(), teacher or make(TEACHER, seed=5)
    ours, theirs = fused_loss(model, teacher, inputs), plain_loss(model, teacher, inputs)
    assert theirs.item() > 0.1
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    assert_same(gradients(model, ours), gradients(model, theirs), tolerance)


@pytest.mark.parametrize("kind", CONFIGS)
def test_heads(kind):
    both(make(kind))
    both(make(kind), teacher=make(kind, seed=7))
    both(make(kind, dtype=torch.float32), teacher=make(kind, seed=7, dtype=torch.float32), tolerance=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    both(model)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_rslora": True},
    ],
)
def test_adapters(options):
    """LoRA on the layers or on the head itself, and a head that peft trains as a copy."""
    model = get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    both(model.double())
    with model.disable_adapter():
        inputs = batch()
        torch.testing.assert_close(
            in_place_of_head(model, lambda hidden, head: head.logits(hidden), **inputs), model(**inputs).logits
        )
    model.base_model.merge_adapter()
    assert fused_loss(model, make(seed=5), batch()).item() > 0.1


def test_dropout_of_an_adapted_head_is_refused():
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], lora_dropout=0.5)
    model = get_peft_model(make(), config).train()
    with pytest.raises(ValueError, match="adapter of the head has a dropout"):
        fused_loss(model, make(seed=5), batch())
    both(model.eval().double())


def autocast_forward(model):
    """As accelerate prepares a model for bf16."""
    function = torch.autocast("cpu", dtype=torch.bfloat16)(type(model).forward)
    model.forward = convert_outputs_to_fp32(function.__get__(model))
    return model


@pytest.mark.parametrize("where", ["around", "within"])
def test_autocast(where):
    """States are what the head would have multiplied, and parameters stay float32."""
    model, teacher, inputs = (make(dtype=torch.float32), make(seed=5, dtype=torch.float32), batch())
    rows, seen = counted(inputs), []
    judge = teacher_head(teacher, rows=rows, **inputs)

    def loss(hidden, head):
        seen.append((hidden.dtype, head.weight.dtype, torch.is_autocast_enabled("cpu")))
        return linear_divergence(hidden[rows], head, [judge]).loss

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around"):
        if where == "within":
            autocast_forward(model)
        theirs = gradients(model, plain_loss(model, teacher, inputs))
        ours = gradients(model, in_place_of_head(model, loss, **inputs))
    assert seen == [(torch.bfloat16, torch.float32, False)]
    assert_same(ours, theirs, tolerance=0.03)

    assert all(gradient.dtype == torch.float32 for gradient in ours.values())


def test_compiled():
    """Compiled code is not made again, whatever the function is."""
    model, inputs, teacher = make(), batch(), make(seed=5)
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    both(compiled, teacher=teacher)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs
    for factor in range(10):
        got = in_place_of_head(compiled, lambda hidden, head, f=factor: f * head.logits(hidden).sum(), **inputs)
        torch.testing.assert_close(got, factor * model(**inputs).logits.sum())
    both(compiled, teacher=teacher)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("how", ["split", pytest.param("compiled", marks=pytest.mark.slow)])
def test_processes_equal_one(tmp_path, how):
    """DDP with and without a search for unused parameters, FSDP2, and compiled DDP, on two gloo processes."""
    in_processes(2, lambda rank: (str(SCRIPT), str(rank), "2", str(tmp_path / "store"), how))


def test_the_model_is_left_as_it_was():
    model, inputs = make(), batch()
    want = model(**inputs).logits

    def fails(hidden, head):
        raise RuntimeError("of the function")

    with pytest.raises(RuntimeError, match="of the function"):
        in_place_of_head(model, fails, **inputs)
    in_place_of_head(model, lambda hidden, head: hidden.sum(), **inputs)
    torch.testing.assert_close(model(**inputs).logits, want)
    assert not model._forward_hooks and not model._forward_pre_hooks and "forward" not in model.lm_head.__dict__


def test_a_function_may_run_the_model_again():
    model, inputs = make(), batch()

    def twice(hidden, head):
        again = in_place_of_head(model, lambda inner, _: inner, **inputs)
        return (hidden - again).abs().max()

    assert in_place_of_head(model, twice, **inputs) == 0


class Other(nn.Module):
    """A model of which the tests choose what follows the head."""

    def __init__(self, after, calls=1):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)
        self.after, self.calls, self.config = after, calls, SimpleNamespace()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        states = self.embedding(input_ids)
        logits = [self.head(states) for _ in range(self.calls)]
        return SimpleNamespace(logits=self.after(logits[-1]) if logits else states)


VOCAB = 11
IDS = torch.arange(6).view(2, 3)


def test_constants_can_be_named():
    model = Other(lambda logits: 5.0 * torch.tanh(0.5 * logits / 5.0))
    head = LMHead(model.head.weight, logit_scale=0.5, softcap=5.0)
    got = in_place_of_head(model, lambda states, head: head.logits(states), head=head, input_ids=IDS)
    torch.testing.assert_close(got, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "after",
    [
        lambda x: 2 * x,
        lambda x: 30 * torch.tanh(x / 30),
        lambda x: 100 * torch.tanh(x / 100),
        lambda x: x + 1,
        torch.exp,
    ],
)
def test_other_logits_are_refused(after, dtype):
    with pytest.raises(ValueError, match="makes other logits than scale 1 and soft cap None do"):
        in_place_of_head(Other(after).to(dtype), lambda states, head: states.sum(), input_ids=IDS)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_head_that_is_not_called_once_is_refused(calls):
    with pytest.raises(ValueError, match=f"called its output embedding {calls} times"):
        in_place_of_head(Other(lambda x: x, calls), lambda states, head: states.sum(), input_ids=IDS)


def test_a_head_that_is_no_product_is_refused():
    class Normed(nn.Linear):
        def forward(self, states):
            return nn.functional.linear(states, nn.functional.normalize(self.weight), self.bias)

    model = Other(lambda x: x)
    model.head = Normed(4, VOCAB)
    with pytest.raises(ValueError, match="Normed is no product with its weight"):
        in_place_of_head(model, lambda states, head: states.sum(), input_ids=IDS)


def test_what_cannot_work_is_refused():
    model = make()
    with pytest.raises(ValueError, match="DataParallel is neither a causal language model nor PEFT"):
        in_place_of_head(nn.DataParallel(model), lambda states, head: states.sum(), **batch())
    with pytest.raises(ValueError, match="Linear is neither"):
        teacher_head(nn.Linear(2, 2), input_ids=IDS)
    with pytest.raises(ValueError, match="labels make the model compute a loss of its own"):
        in_place_of_head(model, lambda states, head: states.sum(), labels=batch()["input_ids"], **batch())
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="without quantisation"):
        in_place_of_head(model, lambda states, head: states.sum(), **batch())
