"""Steps on 1, 2 and 4 processes (gloo, CPU, float32): the same samples, losses, gradients and weights.

Sums over ranks are in another order: losses, metrics and gradients agree to 1e-4 (of the largest entry), weights
after two steps to 1e-3 of the learning rate. AdamW's epsilon is large, or it would turn the rounding of gradients
near 0 into steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks_helpers import STEP, run_cases, same_steps

from tiny.agents.house import HOUSE

DEVICE = str(Path(__file__).with_name("on_pretend_device.py"))
WORLDS = (1, 2, 4)
TAU = 4.0
"""Amid the entropies of the tiny teachers, nats."""

CASES: dict[str, dict[str, Any]] = {
    # Five prompts on four ranks; some ranks have several micro-batches, others one.
    "tied": {"prompts": 5, "config": {"max_tokens_per_batch": 60, "num_generations": 2}},
    "checkpointing": {
        "prompts": 4,
        "config": {"gradient_checkpointing": True, "loss_normalization": "sequence", "max_grad_norm": 0.1},
    },
    "untied": {"prompts": 3, "student": "big", "config": {"divergence": {"code": "jsd", "agentic": "reverse_kl"}}},
    "ranks_without_samples": {"prompts": 4, "drop_first": 2, "config": {}},
    "nothing_left": {"prompts": 4, "drop_first": 4, "config": {}},
    "selection": {
        "prompts": 8,
        "keys": [["agentic"], ["code"]],
        "config": {"method": "camopd", "camopd": {"domain": ["agentic"]}},
    },
    # Both branches in every step; three of a branch, of whichever ranks they are, are compared.
    "coherence": {
        "prompts": 8,
        "keys": [["agentic"], ["code"]],
        "config": {
            "method": "camopd",
            "camopd": {
                "domain": ["agentic"],
                "schedule": "mixed",
                "n_general": 1,
                "diagnose_steps": 2,
                "diagnose_samples": 3,
                "diagnose_dimensions": 64,
            },
        },
    },
    "balance": {
        "prompts": 5,
        "config": {"method": "uni_opd", "uni_opd": {"balance": "global"}, "num_generations": 3},
    },
    "moved_weights": {
        "prompts": 5,
        "config": {
            "method": "sage_opd",
            "sage": {"intervention": "random", "use_failures": False},
            "environment": {"name": HOUSE, "max_turns": 3, "num_environments": 1},
            "train_data": [],
        },
    },
    "debate": {"prompts": 4, "config": {"method": "mad_opd", "debate": {"rounds": 1, "max_tokens": 4}}},
    "written": {"prompts": 3, "config": {"method": "mt_seqkd"}},
    # On four ranks one plays nothing.
    "played_and_written": {
        "prompts": 3,
        "config": {
            "method": "mt_seqkd",
            "environment": {"name": HOUSE, "max_turns": 3, "num_environments": 1},
            "train_data": [],
        },
    },
    # Three prompts on four ranks: one of them never calls its teachers.
    "sharded_debate": {
        "prompts": 3,
        "teacher": {"shard": True},
        "config": {"method": "mad_opd", "debate": {"rounds": 1, "max_tokens": 4}},
    },
    # Rows of all ranks on every rank's part of the vocabulary; some ranks have more micro-batches, one has none.
    "split_vocabulary": {
        "prompts": 5,
        "config": {
            "vocab_parallel_head": True,
            "max_tokens_per_batch": 60,
            "divergence": {"code": "jsd", "agentic": "reverse_kl"},
        },
    },
    "split_untied": {
        "prompts": 3,
        "student": "big",
        "keys": [["agentic"], ["code"]],
        "config": {
            "vocab_parallel_head": True,
            "method": "camopd",
            "camopd": {"domain": ["agentic"], "diagnose_steps": 2, "diagnose_samples": 2, "diagnose_dimensions": 64},
        },
    },
    # Which prompts are given an answer does not depend on the ranks; some rank samples none.
    "mixture": {
        "prompts": 5,
        "config": {"gkd": {"lmbda": 0.5, "completion_column": "answer", "sft_alpha": 0.5}},
    },
    "chosen_divergences": {
        "prompts": 4,
        "keys": [["agentic"], ["code"]],
        "config": {"vocab_parallel_head": True, "method": "eopd", "eopd": {"tau": TAU}},
    },
    "extrapolated": {
        "prompts": 4,
        "config": {
            "vocab_parallel_head": True,
            "method": "g_opd",
            "g_opd": {"reference": "small", "reward_scale": 1.5},
            "advantage": {"kl_mode": "full_vocab"},
        },
    },
    "adapter": {"prompts": 3, "config": {"lora": {"r": 4}}},
    # Parameters are gathered in bfloat16, where a single process computes under autocast.
    # Greedy, since in bfloat16 the rounding of a first step changes what the second one draws.
    "bfloat16": {"prompts": 4, "tolerance": 0.02, "config": {"bf16": True, "temperature": 0.0}},
    "spans": {
        "prompts": 3,
        "teacher": {"tokenizer_alignment": "spans"},
        "config": {"gold": {"uld_hybrid_matched_weight": 1.0, "uld_hybrid_unmatched_weight": 1.0}},
    },
    "frozen_head": {"prompts": 3, "student": "big", "config": {"freeze_head": True}},
}


@pytest.fixture(scope="module")
def found(models: dict[str, str], prompt_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Results by number of processes, then by case."""
    root = tmp_path_factory.mktemp("ranks")
    results = {}
    for world in WORLDS:
        cases = {name: {**case, "config": settings(case, models, prompt_file, root / f"{name}-{world}")}
                 for name, case in CASES.items()}  # fmt: skip
        results[world] = run_cases(cases, world, root)
    return results


def settings(case: dict[str, Any], models: dict[str, str], prompt_file: str, folder: Path) -> dict[str, Any]:
    keys = case.get("keys", ([], []))
    teachers = [
        {"model": models[name], "key": key, **case.get("teacher", {})}
        for name, key in zip(("big", "small"), keys, strict=True)
    ]
    return {
        "model": models[case.get("student", "student")],
        "train_data": [prompt_file],
        "output_dir": str(folder),
        "teachers": teachers,
        "method": "mt_opd",
        "log_tokens": "all",
        **STEP,
        **case["config"],
    }


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_depend_on_the_number_of_processes(found: dict[int, Any], case: str, world: int) -> None:
    one, many = found[1][case], found[world][case]
    same_steps(one, many, CASES[case].get("tolerance", 1e-4))
    assert len({len(targets) for _, _, targets in one["rollouts"][0]}) > 1 or case.endswith(("debate", "written"))
    assert bool(one["gradients"]) == (case != "nothing_left")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_follows_from_the_tokens_that_all_processes_log(found: dict[int, Any], case: str, world: int) -> None:
    of_case = found[world][case]
    losses = [metrics.get("loss", 0.0) for metrics in of_case["metrics"]]
    assert of_case["recomputed"] == pytest.approx(losses, rel=1e-4, abs=1e-7)


def test_the_cases_are_what_they_say(found: dict[int, Any]) -> None:
    first = {name: found[1][name]["metrics"][0] for name in CASES}
    assert first["ranks_without_samples"]["dropped/dropped_by_test"] == 2
    assert first["nothing_left"]["skipped_steps"] == 1 and first["nothing_left"]["policy_version"] == 0
    assert first["checkpointing"]["grad_norm"] > 0.1  # so that clipping acts
    assert 0 < first["selection"]["dropped/selection"] < 8
    assert {"coherence/general/gain", "coherence/domain/gain", "branches/cosine"} <= first["coherence"].keys()
    assert first["balance"]["dropped/balance"] > 0 and first["balance"]["balance/correct_after"] == 0.5
    assert first["moved_weights"]["sage/skip"] > 0 and first["moved_weights"]["sage/strong"] > 0
    assert first["debate"]["debate/generated"] == 4
    assert first["played_and_written"]["episodes/turns"] == 3
    assert 0 < first["mixture"]["gkd/on_policy"] < 1 and 0 < first["chosen_divergences"]["eopd/forward"] < 1
    assert set(found[1]["adapter"]["gradients"]) != set(found[1]["tied"]["gradients"])
    assert "lm_head.weight" not in found[1]["frozen_head"]["gradients"]
    assert "lm_head.weight" in found[1]["untied"]["gradients"]


def test_no_process_holds_a_whole_head_where_it_is_split(found: dict[int, Any], models: dict[str, str]) -> None:
    for case, name in (("split_vocabulary", "student"), ("split_untied", "big")):
        rows = json.loads((Path(models[name]) / "config.json").read_text())["vocab_size"]
        for world in WORLDS[1:]:
            held = found[world][case]["head_rows"]
            assert sum(held) == rows and max(held) == -(-rows // world)


ON_DEVICE = ("split_vocabulary", "adapter")
"""Cases that the ordinary suite runs on the pretend device, with teachers that are split, too."""
LEFT = [name for name in CASES if name not in ON_DEVICE]


@pytest.mark.parametrize(
    "names", [ON_DEVICE, *(pytest.param(tuple(LEFT[i::4]), marks=pytest.mark.slow) for i in range(4))]
)
def test_on_a_pretend_device_two_processes_find_what_one_does_on_the_cpu(
    found: dict[int, Any], models: dict[str, str], prompt_file: str, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """No tensor is left on the CPU: neither by FSDP2 nor where the vocabulary is split."""
    cases = {}
    for name in names:
        case = {**CASES[name], "teacher": {"shard": True}} if name in ON_DEVICE else CASES[name]
        cases[name] = {**case, "config": settings(case, models, prompt_file, tmp_path / name)}
    many = run_cases(cases, 2, tmp_path, DEVICE)
    for name in names:
        assert many[name]["device"] == "pretend:0"
        same_steps(found[1][name], many[name], CASES[name].get("tolerance", 1e-4))


@pytest.mark.parametrize("case", CASES)
def test_processes_exchange_numbers_and_no_rollouts(found: dict[int, Any], case: str) -> None:
    """But for the rows of the logs, gathered once; a split vocabulary gathers what its loss reads of each sample."""
    for step in found[2][case]["sent"]:
        assert [mail["sender"] for mail in step["mail"]].count("step_result") == 1
        others = [mail for mail in step["mail"] if mail["sender"] != "step_result"]
        assert not any(mail["prompt"] for mail in others)
        numbers = [mail for mail in others if mail["sender"] != "vocab_parallel"]
        assert not any(mail["sample"] for mail in numbers)
        assert sum(mail["bytes"] for mail in numbers) <= 1000 + 60 * step["samples"] + 16 * step["tokens"]
