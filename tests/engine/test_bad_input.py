"""Every mistake of a user is one clear message: the value, the remedy, and no model loaded before."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import make_config
from transformers import AutoModelForCausalLM

from opdengine.cli import main
from opdengine.config.loading import load_config
from opdengine.config.train import ConfigError
from opdengine.data.prompts import DataError, PromptSet, PromptStream, load_prompts
from opdengine.errors import VLLMMissingError
from opdengine.methods import PAPERS
from opdengine.methods.unused import unread
from opdengine.models.backbone import load_model
from opdengine.models.chat import load_tokenizer
from opdengine.tools.balance import BalanceSettings, balance
from opdengine.training.run import train
from tiny.agents.house import HOUSE


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def rows(path: Path, *data: Any) -> str:
    path.write_text("".join((d if isinstance(d, str) else json.dumps(d)) + "\n" for d in data))
    return str(path)


# ----------------------------------------------------------------------------------- settings

BASE = {"--model": "m", "--train_data": "d.jsonl", "--output_dir": "o"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learnin_rate", "1"], r"unknown setting 'learnin_rate'; did you mean 'learning_rate'\?"),
        (["--debate.round", "3"], r"unknown setting 'debate.round'; did you mean 'debate.rounds'\?"),
        (["--teachers.0.model", "t", "--teachers.0.nam", "x"], r"'teachers.0.nam'; did you mean 'teachers.0.name'\?"),
        (["--zzzzz", "1"], "unknown setting 'zzzzz'; 'opdengine settings' lists all$"),
        (["--max_new_tokens", "1"], "unknown setting 'max_new_tokens'; here it is max_completion_length$"),
        (["--max_steps", "many"], "max_steps='many' has the wrong type; expected int"),
        (["--max_steps", "1.5"], "max_steps=1.5 has the wrong type"),
        (["--bf16", "maybe"], "bf16='maybe' has the wrong type"),
        (["--max_steps", "0"], "max_steps=0 is not possible; it must be at least 1"),
        (["--divergence", "kl"], r"divergence='kl' is not possible; use \['reverse_kl'"),
        (["--divergence.code", "kl"], "divergence="),
        (["--jsd_beta", "1"], "jsd_beta=1.0 is not possible"),
        (["--top_p", "0"], r"top_p=0.0 is not possible; it lies in \(0, 1\]"),
        (["--debate.top_p", "1.5"], "debate.top_p=1.5 is not possible"),
        (["--top_k", "-1"], "top_k=-1 is not possible"),
        (["--debate.temperature", "-1"], "debate.temperature=-1.0"),
        (["--repetition_penalty", "0"], "repetition_penalty=0.0"),
        (["--debate.tau", "0"], "debate.tau=0.0"),
        (["--debate.rounds", "0"], "debate.rounds=0"),
        (["--temperature", "0", "--num_generations", "2"], "num_generations=2 .* use 1"),
        (["--save_total_limit", "0"], "save_total_limit=0"),
        (["--workspace_bytes", "0"], "workspace_bytes=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--weight_decay", "-1"], "weight_decay=-1"),
        (["--report_to", "wandbb"], "report_to=.*tensorboard"),
        (["--loss_normalization", "batch"], "loss_normalization='batch'.*'token', 'sequence'"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type='cosin'"),
        (["--teachers.0.model", "a/t", "--teachers.1.model", "b/t"], r"share the name \['t'\]"),
        (["--teachers", "[a/t, {model: b/t}]"], r"share the name \['t'\]"),
        (["--teachers", "[[a]]"], r"teachers.0=\['a'\] has the wrong type; expected a mapping"),
        (["--teachers.0.model", "t", "--teachers.0.dtype", "int8"], "teachers.0.dtype='int8'"),
        (["--tau", "0.5"], "'tau'; name its section, too: 'debate.tau' or 'entropy_opd.tau' or 'eopd.tau'"),
        (["--teachers.1.model", "t"], "'1' is not a position in a list of 0"),
        (["--teachers", "null"], "teachers.0=None has the wrong type"),
        (["--model.name.x", "y"], "'model'|'name'"),
        (["--model", "''"], "model='' is not possible; it must not be empty"),
        (["--output_dir="], "--output_dir= needs a value|output_dir='' is not possible; it must not be empty"),
        (["run.yaml"], "unexpected argument 'run.yaml'; settings are given as --config run.yaml"),
        (["model=x"], "unexpected argument 'model=x'; settings are given as --key value"),
    ],
)
def test_settings(arguments: list[str], message: str) -> None:
    base = {key: value for key, value in BASE.items() if not any(a.split("=")[0] == key for a in arguments)}
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*(word for pair in base.items() for word in pair), *arguments])


def test_missing_settings_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing setting 'model', 'output_dir'"):
        load_config(None, [])
    for work in (train, lambda config: balance(config, BalanceSettings(tmp_path / "balanced.jsonl"))):
        with pytest.raises(ConfigError, match=r"train_data=\[\] is not possible; name "):
            work(load_config(None, ["--model", "m", "--output_dir", "o"]))
    with pytest.raises(ConfigError, match=r"train_data=.*the tasks come from the environment"):
        load_config(None, ["--model", "m", "--output_dir", "o", "--train_data", "d", "--environment.name", HOUSE])
    with pytest.raises(ConfigError, match=r"missing setting 'teachers.0.model'"):
        load_config(None, ["--model", "m", "--output_dir", "o", "--teachers.0.name", "t"])
    with pytest.raises(ConfigError, match=r"'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("model: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(tmp_path / "bad.yaml"))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"binary\.yaml: not a text file in UTF-8"):
        load_config(str(tmp_path / "binary.yaml"))
    (tmp_path / "twice.yaml").write_text("model: m\ndebate:\n  rounds: 2\n  tau: 1\n  rounds: 3\n")
    with pytest.raises(ConfigError, match="the setting 'rounds' is given twice, near line 5"):
        load_config(str(tmp_path / "twice.yaml"))
    (tmp_path / "list.yaml").write_text("- model")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(str(tmp_path / "list.yaml"))


def test_what_the_command_line_understands(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ntrain_data: d.jsonl\noutput_dir: o\nlearning_rate: 1e-5\n")
    config = load_config(
        str(tmp_path / "run.yaml"),
        ["--teachers.0.model", "a/b", "--teachers.1.model=c", "--skip-bad-rows", "--max_steps", "1e3",
         "--divergence.code", "reverse_kl", "--divergence.default=jsd", "--run_name", "2026-01-02",
         "--save_total_limit", "null", "--debate.use_confidence", "false", "--chat_template", "{{ x }} {% if %}"],
    )  # fmt: skip
    assert config.learning_rate == 1e-5  # YAML reads this as text
    assert config.train_data == ["d.jsonl"]
    assert [t.name for t in config.teachers] == ["b", "c"]
    assert config.skip_bad_rows is True and config.max_steps == 1000 and config.save_total_limit is None
    assert config.divergence_of("code") == "reverse_kl" and config.divergence_of("x") == "jsd"
    assert config.run_name == "2026-01-02"
    assert config.debate.use_confidence is False
    assert config.chat_template == "{{ x }} {% if %}"


# ------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sft"}, "method='sft' is unknown; choose one of .*mad_opd"),
        ({"method": "mad_opd", "teachers": []}, "needs at least 2 teacher"),
        ({"method": "opd"}, "'opd' uses one teacher per prompt, but .*big.*mt_opd"),
        ({"method": "mt_seqkd", "num_generations": 2}, "num_generations=2 .*one answer per prompt"),
        ({"method": "mad_opd", "debate": {"use_transcript": False, "use_confidence": False}}, "both off"),
        ({"method": "mad_opd", "debate": {"prompts": "chess"}}, "unknown debate prompts 'chess'"),
        ({"divergence": {"code": "jsd"}}, "no entry for data_source 'agentic' and no 'default'"),
        (
            {"method": "mad_opd", "debate": {"prompts": {"code": "code"}}},
            "debate.prompts has no entry for data_source 'agentic' and no 'default'",
        ),
        ({"verifier": "grade"}, "unknown verifier 'grade'; use one of"),
        ({"verifier": "no_such_module:f"}, "'no_such_module:f' cannot be loaded"),
        ({"verifier": "os.path:sep"}, "'os.path:sep' is not callable"),
        ({"verifier": "nowhere.py:f"}, "no Python file 'nowhere.py'"),
        ({"chat_template": "templates/none.jinja"}, "'templates/none.jinja' is neither a file nor a Jinja template"),
        (
            {"model": "no/where"},
            "model 'no/where' is no folder here, is not whole in the cache .*: correct the name, give a folder, or",
        ),
        ({"use_vllm": True}, "vLLM is not installed"),
        ({"report_to": ["tensorboard"]}, "report_to: .tensorboard. needs a package: pip install tensorboard"),
        ({"model": "./nowhere"}, "model folder './nowhere' does not exist; give a folder"),
        ({"max_completion_length": 2000}, "max_completion_length=2000 .* window has 1024 tokens"),
        ({"dtype": "float16"}, "dtype='float16' gives the student float16 parameters.*set dtype: float32"),
        ({"max_prompt_length": 3}, "no prompts left: all 12 are longer than 3 tokens .max_prompt_length."),
        ({"max_completion_length": 1022}, "no prompts left: .* 2 tokens .the student's window of 1024"),
    ],
)
def test_methods_and_folders(
    models: dict[str, str], prompt_file: str, tmp_path: Path, changes: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    here = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in ("vllm", "tensorboard") else here(name)
    )
    with pytest.raises((ValueError, VLLMMissingError), match=message):
        train(make_config(models, prompt_file, tmp_path / "out", **changes), progress=False)
    assert not (tmp_path / "out").exists()  # a refused run leaves nothing behind


def test_a_name_alone_is_a_teacher() -> None:
    named = load_config(None, ["--model", "m", "--output_dir", "o", "--teachers", "[a/one, {model: a/two, weight: 2}]"])
    assert [(t.model, t.name, t.weight) for t in named.teachers] == [("a/one", "one", 1), ("a/two", "two", 2)]


def test_teachers(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    def refused(teachers: list[dict[str, Any]], message: str, **changes: Any) -> None:
        config = make_config(models, prompt_file, tmp_path / "out", teachers=teachers, **changes)
        with pytest.raises(ValueError, match=message):
            train(config, progress=False)

    big, small = models["big"], models["small"]
    refused([{"model": big}, {"model": "/no/such/teacher"}], "'/no/such/teacher' does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused([{"model": big}, {"model": str(empty)}], "has no config.json; save a model there")
    refused([{"model": big}, {"model": small, "weight": 0}], "'small' has weight 0.0; it must be positive")
    refused(
        [{"model": big}, {"model": small, "key": ["code"]}], r"'agentic' is answered by \['big'\]", method="mad_opd"
    )
    both = [{"model": big, "key": ["code", "agentic"]}, {"model": small, "key": ["agentic"]}]
    refused(both, r"several teachers have the key \['agentic'\]", method="opd")
    refused([{"model": big, "name": str(i)} for i in range(9)], "9 teachers given; .* at most 8")


def test_names_that_no_prompt_has_are_pointed_out(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teachers = [{"model": models["big"]}, {"model": models["small"], "key": ["codee", "code", "agentic"]}]
    config = make_config(
        models, prompt_file, tmp_path, teachers=teachers, divergence={"agentik": "jsd", "default": "jsd"}
    )
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="a model was loaded"):
        train(config, progress=False)
    assert "['agentik', 'codee']" in caplog.text


def other_tokenizer(tiny: Any, kind: str) -> Any:
    """Tokenizers that look like the student's."""
    if kind == "another markup":
        return tiny.make_tokenizer(extra=("<|tool|>",))
    tokenizer = tiny.make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    if kind == "two ids swapped":
        vocabulary["~"], vocabulary["^"] = vocabulary["^"], vocabulary["~"]
    else:
        state["model"]["merges"] = state["model"]["merges"][5:]
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("another markup", r"'<\|tool\|>': student \["),
        ("two ids swapped", r"token '\^': student \d+, other \d+"),
        ("other merges", r"'The quick brown fox"),
    ],
)
def test_tokenizers_that_differ_are_refused_with_the_differing_strings(
    tiny: Any, models: dict[str, str], prompt_file: str, tmp_path: Path, kind: str, shown: str
) -> None:
    folder = tmp_path / "other"
    tiny.make_model(folder, other_tokenizer(tiny, kind), seed=5)
    teachers = [{"model": models["big"]}, {"model": str(folder)}]
    with pytest.raises(ValueError, match=rf"teacher 'other' does not share the student's tokenizer(.|\n)*{shown}"):
        train(make_config(models, prompt_file, tmp_path / "out", teachers=teachers), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_chat_template_is_refused(
    tiny: Any, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    folder = tiny.make_model(tmp_path / "plain", tokenizer, seed=5)
    with pytest.raises(ValueError, match=r"plain' has no chat template; set chat_template"):
        train(make_config({**models, "student": folder}, prompt_file, tmp_path / "out"), progress=False)


def test_a_chat_that_the_template_refuses_is_named(models: dict[str, str], tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    data = rows(tmp_path / "d.jsonl", {"id": "strict", "messages": messages})
    with pytest.raises(DataError, match=r"prompt 'strict'.*\['system', 'user'\].*no system"):
        train(make_config(models, data, tmp_path / "out", chat_template=template), progress=False)


def test_a_head_narrower_than_the_tokenizer_is_refused(
    tiny: Any, models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    tokenizer = tiny.make_tokenizer()
    folder = tiny.make_model(tmp_path / "narrow", tokenizer, seed=5, pad_vocab=-1)
    teachers = [{"model": models["big"]}, {"model": folder}]
    with pytest.raises(ConfigError, match=r"narrow: its head has 302 rows, but the tokenizer knows 303"):
        train(make_config(models, prompt_file, tmp_path / "out", teachers=teachers), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_refused(
    tiny: Any, models: dict[str, str], prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(tiny.make_model(tmp_path / "hollow", tiny.make_tokenizer(), seed=5))
    (folder / "model.safetensors").unlink()
    arguments = ["--model", str(folder), "--train_data", prompt_file, "--output_dir", str(tmp_path / "out")]
    arguments += ["--method", "opd", "--teachers.0.model", models["big"]]
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert "hollow' has no model.safetensors; only safetensors are read" in message and "Traceback" not in message


# ---------------------------------------------------------------------------------------- data


def test_bad_rows_are_listed_with_their_numbers(tmp_path: Path) -> None:
    data = rows(
        tmp_path / "d.jsonl",
        {"id": "fine", "prompt": "hello"},
        "{not json",
        {"question": "x"},
        "[1, 2]",
        {"prompt": "  "},
        {"messages": []},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": "fine", "prompt": "again"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"prompt": "x", "tools": "{oops"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": " "}]}]},
        {"prompt": [{"role": "user", "content": 5}]},
        {"prompt": "x", "tools": ["name"]},
    )
    with pytest.raises(DataError) as caught:
        load_prompts([data])
    message = str(caught.value)
    assert message.startswith("13 of 14 rows cannot be used:")
    for expected in (
        "row 2: not JSON",
        "row 3: neither 'prompt' nor 'messages' (columns: ['question'])",
        "row 4: not a JSON object",
        "row 5: empty prompt",
        "row 6: 'messages' is neither text nor a non-empty list of messages",
        "row 7: a message without 'role'",
        "row 8: the last message is the assistant's",
        "row 9: duplicate id 'fine' (first in",
        "row 10: the picture 'x' does not exist below",
        "row 11: 'tools' is not JSON",
        "--skip_bad_rows",
    ):
        assert expected in message
    assert "row 13" not in message  # ten are shown
    kept = load_prompts([data], skip_bad_rows=True)
    assert [p.id for p in kept.prompts] == ["fine"]
    assert sum(kept.dropped.values()) == 13


def test_places_that_cannot_be_written_are_named(
    models: dict[str, str], prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = make_config(models, prompt_file, tmp_path, debate={"cache_dir": f"{prompt_file}/cache"})
    with pytest.raises(ConfigError, match=r"debate.cache_dir='.*/cache' is not possible: '.*train.jsonl' is a file"):
        train(config, progress=False)
    monkeypatch.undo()
    arguments = ["--model", models["student"], "--train_data", prompt_file, "--output_dir", str(tmp_path / "o")]
    output = f"{prompt_file}/balanced.jsonl"
    assert main(["balance", *arguments, "--max_completion_length", "2", "--rollouts", "2", "--output", output]) == 2
    assert f"--output='{prompt_file}' is not possible: '{prompt_file}' is a file" in capsys.readouterr().err

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "secret.yaml")

    monkeypatch.setattr("opdengine.cli.load_config", refuse)
    assert main(["train", "--config", "secret.yaml"]) == 2
    assert capsys.readouterr().err == "opdengine: 'secret.yaml': Permission denied\n"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None, message: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_prompts([str(path)])

    refused("none.jsonl", None, "none.jsonl' does not exist; name a file that ends in .jsonl")
    refused("notes.txt", b"hello", "is of no kind that is read; name a file that ends in .jsonl")
    refused("broken.json", b"[1,", r"broken.json' cannot be read")
    refused("map.json", b'{"rows": []}', "holds a mapping with .'rows'.")
    refused("broken.parquet", b"PAR1", r"broken.parquet' cannot be read")
    refused("latin.jsonl", '{"prompt": "é"}'.encode("latin-1"), "row 1: not UTF-8")
    refused("empty.jsonl", b"\n", "no prompts in")
    (tmp_path / "folder").mkdir()
    refused("folder", None, "folder' cannot be read")
    path = rows(tmp_path / "bad.jsonl", "{", "{")
    with pytest.raises(DataError, match=r"no prompts in .*all 2 rows are bad"):
        load_prompts([path], skip_bad_rows=True)


def test_a_prompt_that_is_no_text_is_called_by_its_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: 'prompt' is neither text nor a non-empty list of messages"):
        load_prompts([rows(tmp_path / "d.jsonl", {"prompt": 12})])


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"prompt": "x"}\n'), ("b.json", '[{"prompt": "x"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(load_prompts([str(tmp_path / name)]).prompts) == 1


def test_files_of_the_same_name_do_not_clash(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(rows(tmp_path / folder / "train.jsonl", {"prompt": folder}, {"prompt": folder * 2}))
    prompts = load_prompts(paths).prompts
    assert len({p.id for p in prompts}) == 4
    assert [p.messages[0]["content"] for p in prompts] == ["a", "aa", "b", "bb"]
    assert [p.id for p in load_prompts(paths[:1]).prompts] == ["train:1", "train:2"]


def test_parquet_and_saved_data_sets_hold_what_jsonl_holds(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    data = [
        {"id": "a", "messages": [{"role": "user", "content": "hi", "name": None}], "answer": "1", "data_source": "x"},
        {"id": "b", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}],
         "answer": "2", "data_source": "y"},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "d.parquet")
    datasets.Dataset.from_list(data).save_to_disk(str(tmp_path / "saved"))
    expected = load_prompts([rows(tmp_path / "d.jsonl", *data)]).prompts
    assert "name" not in expected[0].messages[0]
    assert load_prompts([str(tmp_path / "d.parquet")]).prompts == expected
    assert load_prompts([str(tmp_path / "saved")]).prompts == expected


def test_evaluation_data(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    without = rows(tmp_path / "e.jsonl", {"id": "q7", "prompt": "x"})
    with pytest.raises(ValueError, match=r"1 evaluation prompts have no 'answer' \(e.g. \['q7'\]"):
        train(make_config(models, prompt_file, tmp_path / "out", eval_data=[without]), progress=False)
    long = rows(tmp_path / "l.jsonl", {"id": "q8", "prompt": "x" * 5000, "answer": "1"})
    with pytest.raises(ValueError, match=r"1 evaluation prompts are longer than 1018 tokens .*q8"):
        train(make_config(models, prompt_file, tmp_path / "out", eval_data=[long]), progress=False)


def test_the_command_line_ends_with_one_message(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "d.jsonl", {"id": "q7", "prompt": "x"})
    arguments = ["--model", models["student"], "--train_data", data, "--output_dir", str(tmp_path / "o")]
    assert main(["eval", *arguments, "--eval_data", data]) == 2
    assert "have no 'answer'" in capsys.readouterr().err
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith("opdengine: method 'mad_opd' needs at least 2 teacher")
    assert main(["debate", *arguments, "--prompt", "x"]) == 2
    assert "a debate needs two teachers" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- the stream


def test_the_stream_visits_every_prompt_once_an_epoch_and_resumes(prompt_file: str) -> None:
    prompts = load_prompts([prompt_file])
    stream = PromptStream(prompts, seed=3)
    drawn = [p.id for _ in range(6) for p in stream.next(5)]
    assert sorted(drawn[:12]) == sorted(p.id for p in prompts.prompts) == sorted(drawn[12:24])
    assert drawn[:12] != drawn[12:24]
    again = PromptStream(prompts, seed=3)
    assert [p.id for _ in range(6) for p in again.next(5)] == drawn
    assert [p.id for p in PromptStream(prompts, seed=4).next(12)] != drawn[:12]
    first = PromptStream(prompts, seed=3)
    first.next(5), first.next(5), first.next(5)
    second = PromptStream(prompts, seed=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [p.id for _ in range(3) for p in second.next(5)] == drawn[15:]


def test_the_stream_refuses_other_data_or_another_seed(prompt_file: str) -> None:
    prompts = load_prompts([prompt_file])
    state = PromptStream(prompts, seed=3).state_dict()
    with pytest.raises(DataError, match="seed 3 then, 4 now"):
        PromptStream(prompts, seed=4).load_state_dict(state)
    changed = dataclasses.replace(prompts.prompts[3], tools=({"name": "f"},))
    other = PromptSet((*prompts.prompts[:3], changed, *prompts.prompts[4:]), {})
    with pytest.raises(DataError, match="other training data"):
        PromptStream(other, seed=3).load_state_dict(state)


def test_a_step_of_more_prompts_than_there_are_is_pointed_out(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for size in (12, 13):
        config = make_config(models, prompt_file, tmp_path, per_device_train_batch_size=size)
        with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="a model was loaded"):
            train(config, progress=False)
        assert ("a step takes 13 prompts and there are only 12" in caplog.text) == (size == 13)


def test_settings_that_nothing_reads_are_named(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        models, prompt_file, tmp_path, divergence="jsd", jsd_beta=0.3,
        skew_alpha=0.3, eval_steps=2, debate={"rounds": 3}, camopd={"rho_g": 0.5},
    )  # fmt: skip
    with pytest.raises(AssertionError, match="a model was loaded"):
        train(config, progress=False)
    (said,) = (message for message in caplog.messages if message.startswith("nothing in this run reads"))
    assert all(name in said for name in ("debate.rounds=3", "camopd.rho_g=0.5", "skew_alpha=0.3", "eval_steps=2"))
    assert "jsd_beta" not in said


@pytest.mark.parametrize("file", sorted(Path("examples/configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_setting_of_a_preset_is_read(file: Path) -> None:
    config = load_config(str(file))
    assert not unread(config, PAPERS.get(config.method))


def test_a_misspelt_attention_is_not_replaced(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="spda"):
        load_model(models["student"], attn_implementation="spda")


# ------------------------------------------------------------------------------------- folders


def test_an_output_folder_that_cannot_be_one(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder, message in (
        (tmp_path / "file", "is a file; name a folder"),
        (tmp_path / "file" / "deeper" / "still", "is a file; name a folder"),
        (tmp_path / "nowhere", "is a link to nothing"),
        (tmp_path / "nowhere" / "x", "is a link to nothing"),
        (tmp_path / "loop" / "x", "is a link to nothing|symbolic links"),
        (tmp_path / ("x" * 300), "longer than 255 bytes|name too long"),
        (tmp_path / ("é" * 200), "longer than 255 bytes|name too long"),
        (tmp_path / "/".join(["x" * 200] * 30), "name too long"),
    ):
        config = make_config(models, prompt_file, folder)
        with pytest.raises(ConfigError, match=f"(?i)output_dir=.*({message})"):
            train(config, progress=False)


@pytest.mark.parametrize("name", ["checkpoints", "rollouts", "final", "bad_steps", "evaluations", "tensorboard"])
def test_a_file_where_the_run_wants_a_folder(
    models: dict[str, str], prompt_file: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=f"output_dir=.* is not possible: '{name}' in it is no folder; remove it"):
        train(make_config(models, prompt_file, tmp_path), progress=False)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", ".lock"])
def test_a_folder_where_the_run_wants_a_file(
    models: dict[str, str], prompt_file: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"output_dir=.* is not possible: '{name}' in it is no file; remove it"):
        train(make_config(models, prompt_file, tmp_path), progress=False)


@pytest.mark.parametrize("content", ["", "- a", "model: [", "model: !!python/name:os.x", "{}", "\x00"])
def test_the_configuration_of_a_run_to_resume_is_read_with_the_same_care(
    models: dict[str, str], prompt_file: str, tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml|missing setting"):
        train(make_config(models, prompt_file, tmp_path, resume_from_checkpoint="latest"), progress=False)


def test_a_home_folder_is_written_out(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = make_config(models, prompt_file, tmp_path)
    config = dataclasses.replace(config, output_dir="~/runs/1", model="~/m", chat_template="~/t.jinja")
    config = dataclasses.replace(config, debate=dataclasses.replace(config.debate, cache_dir="~/c"))
    assert (config.output_dir, config.model) == (f"{tmp_path}/runs/1", f"{tmp_path}/m")
    assert (config.chat_template, config.debate.cache_dir) == (f"{tmp_path}/t.jinja", f"{tmp_path}/c")
    with pytest.raises(ConfigError, match="there is no user 'no_such_user'"):
        load_prompts(["~no_such_user/d.jsonl"])


def test_templates_that_are_none(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for template, message in (
        (str(tmp_path), "is neither a file nor a Jinja template"),
        (str(tmp_path / "binary"), "is no text file in UTF-8"),
        ("x" * 5000, "is neither a file nor a Jinja template"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(models["student"], chat_template=template)
    long = "{# " + "x" * 400 + " #}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert load_tokenizer(models["student"], chat_template=long).chat_template == long


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "config.json"), ("[]", "config.json"), ("{", "config.json"), ("{}", "bad"), ('{"model_type": 5}', "bad"),
     ('{"model_type": "no_such"}', "no_such"), ("[" * 100_000, "config.json"),
     ('{"model_type": "\\u001b[31m"}', "bad")],
)  # fmt: skip
def test_a_model_whose_configuration_is_none(
    models: dict[str, str], prompt_file: str, tmp_path: Path, content: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(models["big"], tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(content)
    arguments = ["--model", str(tmp_path / "bad"), "--train_data", prompt_file, "--output_dir", str(tmp_path / "out")]
    arguments += ["--method", "opd", "--teachers.0.model", models["big"]]
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("opdengine: ") or "\nopdengine: " in said
    assert message in said and "Traceback" not in said and "\x1b" not in said
