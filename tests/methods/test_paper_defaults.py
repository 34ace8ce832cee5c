"""What a run takes from the paper of its method where it says nothing, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from opdengine.cli import main
from opdengine.config.loading import from_mapping, load_config, to_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.methods import METHODS, PAPERS
from opdengine.methods.paper import Paper, value_of
from opdengine.tools.explain import annotated
from opdengine.training.run import train
from opdengine.training.run_folder import RunFolder

GIVEN: dict[str, Any] = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"]}
MAD_OPD = {
    "jsd_beta": 0.5, "teacher_reduction": "sum", "divergence_temperature": 1.0, "loss_normalization": "sequence",
    "num_generations": 1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.2,
    "learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.01,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 1.0,
}  # fmt: skip
SAGE_OPD = {
    "divergence": "reverse_kl", "loss_normalization": "token", "num_generations": 1, "temperature": 0.4, "top_p": 1.0,
    "top_k": 0, "environment.eval_temperatures": [0.4], "learning_rate": 1e-6, "weight_decay": 0.1,
}  # fmt: skip
VALUES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mad_opd", "mt_opd"), MAD_OPD),
    "mt_seqkd": {**MAD_OPD, "repetition_penalty": 1.0},
    "opad": {**MAD_OPD, "divergence": "jsd"},
    **dict.fromkeys(("sage_opd", "tcod", "entropy_opd"), SAGE_OPD),
    "uni_opd": {
        "divergence": "reverse_kl", "loss_normalization": "sequence", "advantage.importance": "clip",
        "advantage.max_gap": 10.0, "num_generations": 16, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "learning_rate": 1e-6, "lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1, "weight_decay": 0.1,
        "adam_beta1": 0.9, "adam_beta2": 0.98,
    },
    "camopd": {
        "divergence": "reverse_kl", "loss_normalization": "sequence", "advantage.importance": "band",
        "advantage.max_gap": float("inf"), "num_generations": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "learning_rate": 2e-6, "max_grad_norm": 1000.0,
    },
    "sdft": {
        "teacher_prompt_template": "{prompt}\n\nThis is an example for a response to the question:\n"
        "{privileged_context}\n\nNow answer with a response of your own, including the thinking process.",
        "divergence": "reverse_kl", "loss_normalization": "sequence", "num_generations": 1, "temperature": 1.0,
    },
    "sdpo": {
        "divergence": "reverse_kl", "advantage.importance": "truncated", "advantage.high": 2.0,
        "advantage.max_gap": float("inf"), "loss_normalization": "sequence", "num_generations": 8, "temperature": 1.0,
        "learning_rate": 1e-6,
    },
    "opsd": {
        "teacher_prompt_template": "{prompt}\n\nA reference solution:\n\n{privileged_context}\n\nUnderstand why it is "
        "right. Then solve the problem again in your own words, step by step.",
        "divergence": "jsd", "jsd_beta": 0.5, "loss_normalization": "token", "num_generations": 1, "temperature": 1.2,
        "top_p": 0.95, "top_k": 20, "learning_rate": 2e-5,
    },
    "grpo": {
        "loss_normalization": "sequence", "num_generations": 64, "learning_rate": 1e-6, "grpo.weight": 1.0,
    },
    "eopd": {"divergence": "reverse_kl", "loss_normalization": "token"},
    "gkd": {
        "gkd.lmbda": 0.5, "divergence": "jsd", "jsd_beta": 0.5, "loss_normalization": "token", "num_generations": 1,
        "temperature": 0.9,
    },
    "g_opd": {
        "divergence": "reverse_kl", "advantage.importance": "none", "advantage.max_gap": float("inf"),
        "loss_normalization": "token", "temperature": 1.0,
    },
    "relaxed_opd": {
        "divergence": "reverse_kl", "advantage.importance": "clip", "advantage.max_gap": float("inf"),
        "loss_normalization": "token",
    },
    "selectkd": {"loss_normalization": "token"},
    "gold": {
        "advantage.kl_mode": "full_vocab", "advantage.importance": "none", "advantage.max_gap": float("inf"),
        "loss_normalization": "sequence", "num_generations": 1,
        "temperature": 0.9, "top_p": 0.95, "learning_rate": 1e-7,
    },
}  # fmt: skip
"""As the papers and their code have them, read a second time."""

EVERY = [(method, setting) for method, paper in PAPERS.items() for setting in paper.defaults]


def one(setting: str, value: Any) -> dict[str, Any]:
    section, _, name = setting.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def test_every_method_but_plain_opd_has_a_paper() -> None:
    assert set(METHODS) - set(PAPERS) == {"opd"}


@pytest.mark.parametrize("method", sorted(PAPERS))
def test_the_values_are_the_papers(method: str) -> None:
    assert {setting: PAPERS[method][setting] for setting in PAPERS[method].defaults} == VALUES[method]


@pytest.mark.parametrize(("method", "setting"), EVERY)
def test_a_run_that_says_nothing_takes_the_papers_value(method: str, setting: str) -> None:
    assert value_of(from_mapping(TrainConfig, {**GIVEN, "method": method}), setting) == PAPERS[method][setting]


@pytest.mark.parametrize(("method", "setting"), EVERY)
def test_what_a_run_says_stays_also_where_it_is_the_general_default(method: str, setting: str) -> None:
    general = value_of(TrainConfig("m", "o", ["d.jsonl"]), setting)
    config = from_mapping(TrainConfig, {**GIVEN, "method": method, **one(setting, general)})
    assert value_of(config, setting) == general


@pytest.mark.parametrize("method", sorted(PAPERS))
def test_what_is_filled_in_is_no_more_than_what_is_declared(method: str) -> None:
    config, general = from_mapping(TrainConfig, {**GIVEN, "method": method}), TrainConfig(**GIVEN, method=method)
    for setting in PAPERS[method].defaults:
        section, _, name = setting.rpartition(".")
        place = getattr(general, section) if section else general
        object.__setattr__(place, name, value_of(config, setting))
    assert config == general


def test_the_command_line_names_the_method_as_well() -> None:
    arguments = ["--model", "m", "--output_dir", "o", "--train_data", "d.jsonl", "--method", "uni_opd"]
    assert load_config(None, arguments).num_generations == 16
    assert load_config(None, [*arguments, "--num_generations", "1"]).num_generations == 1


def test_other_settings_of_a_section_leave_room_for_the_papers() -> None:
    config = from_mapping(TrainConfig, {**GIVEN, "method": "uni_opd", "advantage": {"kl_mode": "full_vocab"}})
    assert (config.advantage.kl_mode, config.advantage.importance, config.advantage.max_gap) == (
        "full_vocab",
        "clip",
        10,
    )
    with pytest.raises(ConfigError, match="advantage=None has the wrong type"):
        from_mapping(TrainConfig, {**GIVEN, "method": "uni_opd", "advantage": None})


@pytest.mark.parametrize("method", ["opd", "file.py:function"])
def test_other_methods_have_the_general_defaults(method: str) -> None:
    assert from_mapping(TrainConfig, {**GIVEN, "method": method}) == TrainConfig(**GIVEN, method=method)


def test_a_value_in_a_list_is_no_ones_but_the_runs() -> None:
    first, second = (from_mapping(TrainConfig, {**GIVEN, "method": "sage_opd"}) for _ in range(2))
    first.environment.eval_temperatures.append(1.0)
    assert second.environment.eval_temperatures == PAPERS["sage_opd"]["environment.eval_temperatures"] == [0.4]


def test_the_written_settings_show_them_and_are_read_as_they_are(tmp_path: Path) -> None:
    """A run that was written before a paper's default changed is resumed with its own value."""
    folder = RunFolder(from_mapping(TrainConfig, {**GIVEN, "method": "opad", "output_dir": str(tmp_path)}))
    folder.claim()
    folder.release()
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (written["divergence"], written["loss_normalization"]) == ("jsd", "sequence")
    older = {**written, "divergence": "reverse_kl", "loss_normalization": "token"}
    assert to_mapping(from_mapping(TrainConfig, older)) == older


def test_a_run_says_what_it_has_of_the_paper_and_what_not(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teachers = [{"model": models["big"]}, {"model": models["small"]}]
    data = {"model": models["student"], "teachers": teachers, "train_data": [prompt_file], "method": "mt_seqkd",
            "output_dir": str(tmp_path / "run"), "max_completion_length": 4, "max_steps": 1,
            "per_device_train_batch_size": 2, "learning_rate": 1e-3, "log_completions": False}  # fmt: skip
    with caplog.at_level("INFO"):
        train(from_mapping(TrainConfig, data), progress=False)
    said = [message for message in caplog.messages if message.startswith("mt_seqkd (arXiv 2605.01347), ")]
    same, open_, other, chosen = (message.partition("), ")[2] for message in said)
    assert (
        same.startswith("as in the paper: ") and "loss_normalization=sequence" in same and "learning_rate" not in same
    )
    assert open_ == "unstated in the paper: temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.0"
    assert other == "not as in the paper: learning_rate=0.001 (there 1e-05: released scripts)"
    assert "teachers.weight=[1.0, 1.0] (there 7 : 3, strong : weak)" in chosen
    assert "prompts_per_step=2 (there 128)" in chosen


def test_the_prompts_of_a_step_are_those_of_all_processes() -> None:
    config = from_mapping(TrainConfig, {**GIVEN, "method": "camopd"})
    assert "prompts_per_step=32 (there 512)" in PAPERS["camopd"].report(config, processes=4)[-1]


@pytest.mark.parametrize("method", sorted(PAPERS))
def test_the_papers_settings_are_printed_as_a_configuration(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", f"method.{method}"]) == 0
    shown = capsys.readouterr().out
    explicit = from_mapping(TrainConfig, {**GIVEN, **yaml.safe_load(shown)})
    assert explicit == from_mapping(TrainConfig, {**GIVEN, "method": method})
    assert f"# arXiv {PAPERS[method].arxiv}" in shown
    assert all(where in shown for _, where in PAPERS[method].defaults.values())
    assert all(f"# {setting}: {text}" in shown for setting, text in PAPERS[method].choices.items())


def test_all_settings_name_the_methods_that_have_another_default() -> None:
    assert "\n#num_generations: 1\n#   mt_opd, mt_seqkd, mad_opd, opad, sage_opd, tcod" in annotated()
    assert "\n#   uni_opd: 16\n" in annotated(["num_generations"])
    assert main(["settings", "method.opd"]) == 2


@pytest.mark.parametrize("method", sorted(PAPERS))
def test_every_setting_that_a_paper_names_exists(method: str) -> None:
    config = from_mapping(TrainConfig, {**GIVEN, "method": method})
    for setting in (*PAPERS[method].defaults, *PAPERS[method].choices):
        value_of(config, setting)


def test_a_section_that_is_not_there_is_made() -> None:
    paper = Paper("1", {"a": (1, "x"), "s.b": ([2], "y")})
    assert paper.fill({}) == {"a": 1, "s": {"b": [2]}}
    given = {"s": {"b": 3, "c": 4}}
    assert paper.fill(given) == {"a": 1, "s": {"b": 3, "c": 4}} and given == {"s": {"b": 3, "c": 4}}
