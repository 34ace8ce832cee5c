"""The cost model against what small runs really do: parameters, FLOPs of every phase, bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from engine_helpers import make_config, make_engine, make_samples
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from opdengine.cli import main
from opdengine.data.prompts import load_prompts
from opdengine.tools.plan import Lengths, Machine, Plan, loss_flops, memory_of, plan
from opdengine.tools.shapes import QWEN3, shape_of
from opdengine.types import Batch

Models = dict[str, str]

DENSE = Qwen3Config(
    vocab_size=2000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
)  # fmt: skip
MIXTURE = Qwen3MoeConfig(
    vocab_size=2000, hidden_size=64, intermediate_size=160, moe_intermediate_size=48, num_experts=8,
    num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_parameters_and_flops_of_a_model(config: Qwen3Config, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    assert shape.parameters == matrices
    length = 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(torch.arange(length)[None])
    if config is DENSE:  # the counter does not know the grouped products of a mixture
        # Eager attention computes the upper triangle too: every token attends to the whole length.
        assert counter.get_total_flops() == pytest.approx(shape.body_flops(length, length), rel=0.01)


def test_flops_of_the_update(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """Forward and backward of the student and the fused loss of two teachers, counted while they run.

    Attention is eager: the counter knows its products, which reach over the whole row.
    """
    config = make_config(models, prompt_file, tmp_path, max_completion_length=24, attn_implementation="eager")
    engine = make_engine(config)
    samples = make_samples(engine, load_prompts([prompt_file]).prompts[:4])
    engine.probed = True
    engine._differences = lambda tally, samples: torch.zeros(1).numpy()  # type: ignore[assignment,method-assign,return-value]
    with FlopCounterMode(display=False) as counter:
        engine.update(Batch(samples=samples))
    student = shape_of(models["student"])
    teachers = [shape_of(models["big"]), shape_of(models["small"])]
    tokens = sum(len(i.token_ids) for i in samples)
    targets = sum(len(i.target_ids) for i in samples)
    width = max(len(i.token_ids) for i in samples)
    body = 3 * student.body_flops(tokens, width)
    expected = body + loss_flops(student, teachers, targets)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.12)


def test_known_shapes_have_the_advertised_sizes() -> None:
    sizes = {"Qwen3-0.6B": 0.6, "Qwen3-1.7B": 1.7, "Qwen3-4B": 4.0, "Qwen3-8B": 8.2, "Qwen3-14B": 14.8,
             "Qwen3-32B": 32.8, "Qwen3-30B-A3B": 30.5}  # fmt: skip
    for name, billions in sizes.items():
        assert QWEN3[name].parameters / 1e9 == pytest.approx(billions, rel=0.02), name
    a3b = QWEN3["Qwen3-30B-A3B"]
    assert (a3b.active_parameters + 2 * a3b.head_parameters) / 1e9 == pytest.approx(3.3, rel=0.03)


def test_bytes_of_the_student_are_those_of_a_trained_one(models: Models, prompt_file: str, tmp_path: Path) -> None:
    config = make_config(models, prompt_file, tmp_path)
    engine = make_engine(config)

    async def step() -> None:
        await engine.step(load_prompts([prompt_file]).prompts[:4])

    asyncio.run(step())
    model = engine.student.model
    size = sum(2 * p.numel() * p.element_size() for p in model.parameters())  # weights and gradients
    size += sum(v.numel() * v.element_size() for s in engine.optimizer.state.values() for v in s.values() if v.dim())
    counted = memory_of(config, shape_of(models["student"]), [], Machine(), 100)
    assert counted["student: weights, gradients, AdamW"] == pytest.approx(size, rel=0.01)


def test_a_plan_scales_as_it_should() -> None:
    from opdengine.config.train import TeacherConfig, TrainConfig

    def make(gpus: int, **changes: object) -> object:
        config = TrainConfig(
            model="Qwen/Qwen3-14B",
            output_dir="o",
            train_data=["d"],
            teachers=[TeacherConfig("Qwen/Qwen3-32B"), TeacherConfig("Qwen/Qwen3-30B-A3B")],
            gradient_checkpointing=True,
            bf16=True,
            **changes,  # type: ignore[arg-type]
        )
        return plan(config, Machine(gpus=gpus), Lengths(500, 2000, 800))

    one, eight, far = make(1), make(8), make(64)
    key = "student: weights, gradients, AdamW"
    assert one.memory[key] == 8 * eight.memory[key]  # type: ignore[attr-defined]
    assert not one.fits and one.memory["teachers"] > 120e9  # type: ignore[attr-defined]
    for phase in ("debate", "score"):  # data parallel: more prompts, the same time
        assert eight.phases[phase].seconds == pytest.approx(one.phases[phase].seconds)  # type: ignore[attr-defined]
    assert far.phases["sync"].seconds > eight.phases["sync"].seconds  # type: ignore[attr-defined]
    assert "debate" not in make(1, method="mt_opd").phases  # type: ignore[attr-defined]
    assert eight.bottleneck in str(eight) and "does NOT fit" in str(one)  # type: ignore[attr-defined]


def test_a_plan_of_split_teachers_and_of_a_split_head() -> None:
    from opdengine.config.method_sections import GkdConfig
    from opdengine.config.train import TeacherConfig, TrainConfig

    shape = QWEN3["Qwen3-32B"]
    head = 2 * shape.head_parameters

    def make(teacher: dict[str, object], gpus: int = 8, **changes: object) -> Plan:
        config = TrainConfig(
            model="Qwen/Qwen3-14B", output_dir="o", train_data=["d"], bf16=True,
            teachers=[TeacherConfig("Qwen/Qwen3-32B", **teacher), TeacherConfig("Qwen/Qwen3-8B", offload=True)],  # type: ignore[arg-type]
            **changes,  # type: ignore[arg-type]
        )  # fmt: skip
        return plan(config, Machine(gpus=gpus), Lengths(500, 2000, 800))

    whole, split, written = make({}), make({"shard": True}), make({"shard": True, "writer_base_url": "http://h/v1"})
    small = 2 * QWEN3["Qwen3-8B"].head_parameters  # what an offloaded teacher leaves on the GPU
    assert whole.memory["teachers"] == 2 * shape.parameters + small
    assert split.memory["teachers"] == (2 * shape.parameters - head) / 8 + head + small
    assert split.phases["score"].sent > 0 == whole.phases["score"].sent
    assert split.phases["debate"].seconds > 3 * whole.phases["debate"].seconds  # all weights for every token
    assert written.phases["debate"].seconds < whole.phases["debate"].seconds and "written elsewhere" in str(written)
    given = {"method": "mt_opd", "gkd": GkdConfig(lmbda=0.0)}
    stored, alone = make({"stored": "s"}, **given), make({"stored": "s", "stored_only": True}, **given)
    assert alone.memory["teachers"] == head + small and stored.memory["teachers"] == whole.memory["teachers"]
    assert (
        alone.phases["score"].flops
        < 0.5 * stored.phases["score"].flops
        == 0.5 * make({}, **given).phases["score"].flops
    )
    assert "counted as in the first epoch" in str(stored) and "first epoch" not in str(alone)
    rows = make({}, vocab_parallel_head=True)
    assert rows.memory["fused loss"] < whole.memory["fused loss"]
    width = sum(QWEN3[name].hidden for name in ("Qwen3-32B", "Qwen3-8B"))
    assert whole.memory["teachers' hidden states"] == 2 * 16384 * width  # of a micro-batch, whatever the batch
    assert make({}, per_device_train_batch_size=64).memory == whole.memory
    assert f"on the host: {8 * 2000 * 2 * width / 2**30:.1f} GiB per GPU" in str(whole)
    gathered = "student: gathered layers and head"
    saved = 2 * QWEN3["Qwen3-14B"].head_parameters * (1 - 1 / 8)
    assert whole.memory[gathered] - rows.memory[gathered] == pytest.approx(saved)


def test_decoding_is_bound_by_memory_for_few_sequences_and_by_products_for_many() -> None:
    from opdengine.tools.plan import _decode

    shape, machine = QWEN3["Qwen3-4B"], Machine()
    single = _decode(shape, machine, 1, 10, 1000)
    assert single.seconds == pytest.approx(1000 * 2 * 4.02e9 / (machine.bandwidth * 0.6), rel=0.05)
    many = _decode(shape, machine, 4096, 10, 100)
    assert many.seconds < 4096 * single.seconds / 10 / 20


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    config = "examples/configs/mad_opd_code_qwen3_14b_8b_to_4b.yaml"
    assert main(["plan", "--config", config, "--gpus", "8", "--mean_completion", "4000"]) == 0
    text = capsys.readouterr().out
    assert "8 x h200" in text and "bottleneck: debate" in text
    assert main(["plan", "--config", config, "--gpu", "tpu"]) == 2
    assert main(["plan", "--config", config, "--gpus", "0"]) == 2
    assert main(["plan", "--config", config, "--model", "some/where/else"]) == 2
    assert "'some/where/else'" in (told := capsys.readouterr().err) and "give a folder that has one" in told


def test_a_plan_says_what_it_assumed(
    models: Models, prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(models, prompt_file, tmp_path, method="mad_opd")
    assumed = "\n".join(plan(config, Machine()).assumed)
    for said in (
        "a prompt has 4096 tokens on average, its limit in the settings: an upper bound (--mean_prompt says better)",
        "a completion has 6 tokens on average, its limit",
        "a teacher's turn in a debate has 5 tokens",
        "h200: large products reach 45 % of 989 TFLOP/s (bfloat16), decoding 60 % of 4.8 TB/s",
        "16 bytes a weight",
        "no debate is in the cache",
    ):
        assert said in assumed
    assert "a prompt has 100 tokens on average\n" in "\n".join(plan(config, Machine(), Lengths(100, 6, 5)).assumed)
    arguments = ["plan", "--model", models["student"], "--teachers.0.model", models["big"], "--method", "opd"]
    assert main([*arguments, "--mean_completion", "9", "--gpu", "l40s"]) == 0
    shown = capsys.readouterr().out
    assert "assumed:\n  a prompt has" in shown and "a completion has 9 tokens on average\n" in shown
    assert "l40s: large products reach" in shown and "debate" not in shown.partition("assumed:")[2]


def test_a_debate_under_another_method_is_counted(models: Models, prompt_file: str, tmp_path: Path) -> None:
    settings = {"verifier": "exact_match", "num_generations": 2, "use_vllm": False}
    plain = make_config(models, prompt_file, tmp_path, method="uni_opd", **settings)
    debated = make_config(models, prompt_file, tmp_path, method="uni_opd", contexts="debate", **settings)
    assert "debate" not in plan(plain, Machine()).phases and plan(debated, Machine()).phases["debate"].flops > 0


def test_a_plan_with_an_exact_teacher_elsewhere() -> None:
    """Its head and its states are here; what it computes is not."""
    from opdengine.config.train import TeacherConfig, TrainConfig

    def make(**teacher: object) -> Plan:
        one = TeacherConfig(**{"model": "Qwen/Qwen3-32B", **teacher})  # type: ignore[arg-type]
        config = TrainConfig(model="Qwen/Qwen3-14B", output_dir="o", train_data=["d"], teachers=[one], method="opd")
        return plan(config, Machine(gpus=8), Lengths(500, 2000, 800))

    here, far = make(), make(hidden_states_url=["http://h:1"])
    shape = QWEN3["Qwen3-32B"]
    assert far.memory["teachers"] == 2 * shape.head_parameters < here.memory["teachers"]
    for name in ("teachers' hidden states", "fused loss"):
        assert far.memory[name] == here.memory[name]
    assert far.phases["score"].flops == 0 < here.phases["score"].flops
    assert far.phases["update"] == here.phases["update"]
    size = 2 * 8 * 8 * 2000 * shape.hidden / 1e9
    assert f"Qwen3-32B sends {size:.2f} GB of hidden states a step" in str(far) and "served elsewhere" in str(far)
    whole = make(hidden_states_url=["http://h:1"], hidden_states_dtype="float32")
    assert f"sends {2 * size:.2f} GB" in str(whole)
    unknown = make(model="its-name", hidden_states_url=["http://h:1"])
    assert "no config.json is here: its-name" in str(unknown) and unknown.memory["teachers"] == 0
