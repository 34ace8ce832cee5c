"""Sections of settings: checked however they are built, named as the user writes them, and marked at the field."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from opdengine.config.loading import from_mapping, to_mapping
from opdengine.config.method_sections import CaMOPDConfig, DebateConfig, SageConfig
from opdengine.config.section import RESUMABLE, every_setting
from opdengine.config.sections import DataConfig, EnvironmentConfig, LoRAConfig, TeacherConfig
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError

NEEDED: dict[str, Any] = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"]}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (SageConfig, {"alpha": 2}, r"^sage.alpha=2.0 is not possible; it lies between SKIP's 0 and STRONG's 1$"),
        (
            SageConfig,
            {"kl_mode": "all"},
            r"^sage.kl_mode='all' is not possible; choose one of \['full_vocab', 'sampled'\]$",
        ),
        (DebateConfig, {"round": 3}, r"^unknown setting 'debate.round'; did you mean 'debate.rounds'\?$"),
        (DebateConfig, {"rounds": "many"}, r"^debate.rounds='many' has the wrong type; expected int$"),
        (CaMOPDConfig, {"rho_g": True}, r"^camopd.rho_g=True has the wrong type; expected float$"),
        (EnvironmentConfig, {"eval_temperatures": [0, -1]}, r"^environment.eval_temperatures=\[0.0, -1.0\] is not"),
        (LoRAConfig, {"target_modules": []}, r"^lora.target_modules=\[\] is not possible; name at least one layer"),
        (LoRAConfig, {"target_modules": {}}, r"^lora.target_modules=\{\} has the wrong type; expected text or a list$"),
        (DataConfig, {}, r"^missing setting 'data.path'$"),
        (
            TeacherConfig,
            {"model": "t", "base_url": "http://h/v1", "shard": True},
            r"^shard=True is not possible; the w",
        ),
        (
            TrainConfig,
            {**NEEDED, "teachers": [{"model": "t", "weight": -1}]},
            r"^teachers.0.weight=-1.0 is not possible",
        ),
        (
            TrainConfig,
            {**NEEDED, "teachers": [{"model": "t"}, 3]},
            r"^teachers.1=3 has the wrong type; expected a mapping$",
        ),
        (
            TrainConfig,
            {**NEEDED, "train_data": [None]},
            r"^train_data.0=None has the wrong type; expected text or a mapping",
        ),
        (TrainConfig, {**NEEDED, "verifier": {"a": " "}}, r"^verifier.a=' ' is not possible; it must not be empty"),
        (TrainConfig, {**NEEDED, "max_steps": 0, "seeed": 1}, r"^unknown setting 'seeed'; did you mean 'seed'\?$"),
    ],
)
def test_a_section_that_is_built_by_hand_is_checked_like_one_that_is_read(
    section: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**values)


def test_a_changed_copy_is_checked() -> None:
    config = TrainConfig(**NEEDED, teachers=[TeacherConfig("a/t")])
    assert dataclasses.replace(config, seed=3).seed == 3 and config.teachers[0].name == "t"
    with pytest.raises(ConfigError, match="seed=-1 is not possible"):
        dataclasses.replace(config, seed=-1)
    with pytest.raises(ConfigError, match=r"teachers.0.shard=True is not possible; it calls for max_staleness: 0"):
        dataclasses.replace(config, teachers=[TeacherConfig("t", shard=True)], max_staleness=1, use_vllm=True)


def test_copies_are_equal() -> None:
    config = TrainConfig(**NEEDED, debate=DebateConfig(rounds=3), teachers=[TeacherConfig("t", key=["a"])])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert from_mapping(TrainConfig, to_mapping(config)) == config


@pytest.mark.parametrize("place", ["max_steps", "bf16", "dtype", "debate", "vllm_mode", "lora"])
def test_no_message_about_a_wrong_value_repeats_a_secret(place: str) -> None:
    with pytest.raises(ConfigError, match=f"{place} looks like a secret") as refused:
        from_mapping(TrainConfig, {**NEEDED, place: "sk-abcdefghijklmnop1234"})
    assert "sk-" not in str(refused.value)


def test_settings_that_decide_what_is_learned_are_not_marked_as_free_to_change() -> None:
    free = {name for name, info in every_setting(TrainConfig) if RESUMABLE in info.metadata}
    assert {"loss_impl", "per_device_train_batch_size", "teachers.0.base_url", "eval_data"} <= free
    assert not free & {"model", "method", "learning_rate", "seed", "temperature", "teachers.0.model", "debate.rounds"}


def test_every_setting_has_help_of_its_own() -> None:
    assert [name for name, info in every_setting(TrainConfig) if not info.description] == []
