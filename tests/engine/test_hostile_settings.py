"""Settings that nobody can mean: each is refused by its name, in one sentence, without a traceback and at once."""

from __future__ import annotations

import dataclasses
import re
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdengine.cli import main
from opdengine.config.loading import from_mapping, load_config, to_mapping
from opdengine.config.secrecy import holds_secret, names_secret
from opdengine.config.section import Section, fields_of, range_of
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.config.yaml_text import dump_yaml, plain, read_yaml
from opdengine.workers.printing import brief, harmless
from tiny.agents.house import HOUSE

NEEDED = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"]}
Place = tuple[str, ...]


def settings_of(cls: type, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every setting with its type; sections in lists are taken for one item."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = [part for outer in (hint, *typing.get_args(hint)) for part in (outer, *typing.get_args(outer))]
        section = next((part for part in inner if dataclasses.is_dataclass(part)), None)
        if section is None:
            yield (*place, field.name), hint
        else:
            yield from settings_of(section, (*place, field.name))


EVERY = dict(settings_of(TrainConfig))
NUMBERS = [place for place, hint in EVERY.items() if {int, float} & {hint, *typing.get_args(hint)}]


def with_setting(place: Place, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {**NEEDED}
    needed = {"teachers": {"model": "t"}, "train_data": {"path": "p"}, "eval_data": {"path": "p"}}
    if len(place) == 1:
        return {**data, place[0]: value}
    inner = {**needed.get(place[0], {}), place[1]: value}
    return {**data, place[0]: [inner] if place[0] in needed else inner}


def test_every_number_has_a_range() -> None:
    for cls in Section.__subclasses__():
        hints = typing.get_type_hints(cls)
        numbers = {f.name for f in dataclasses.fields(cls) if {int, float} & {hints[f.name], *_inner(hints[f.name])}}
        assert numbers == {name for name, info in fields_of(cls).items() if range_of(info)}, cls


def _inner(hint: Any) -> set[Any]:
    return set(typing.get_args(hint)) if typing.get_origin(hint) is not dict else set()


ABSURD = [float("nan"), float("-inf"), 10**400, -(10**400), "1e999", "nan", "many", "", True, [], {}, [[1]], "010"]


@pytest.mark.parametrize("place", NUMBERS, ids=".".join)
def test_a_number_that_cannot_be_is_refused_by_name(place: Place) -> None:
    for value in (*ABSURD, float("inf")):
        if value == float("inf") and from_mapping_or_none(place, value) is not None:
            continue  # what .inf means there is in the setting's description
        if value == [] and place == ("environment", "eval_temperatures"):
            value = [float("nan")]
        if value == "1e999" and from_mapping_or_none(place, float("inf")) is not None:
            continue
        with pytest.raises(ConfigError, match=re.escape(place[-1])) as refused:
            from_mapping(TrainConfig, with_setting(place, value))
        assert len(str(refused.value)) < 500


def from_mapping_or_none(place: Place, value: Any) -> TrainConfig | None:
    try:
        return from_mapping(TrainConfig, with_setting(place, value))
    except ConfigError:
        return None


WEIRD = [
    *("", " ", "[/x]", "\x1b[31m", "\ud800", "x\x00", "12:30", "no", "2024-01-01", "1e-5", "010", "9" * 5000, "~", "#"),
    *("null", "- a", "\xe9\u2028\u0085", "- \n  b: c", b"x", object(), None, {"a": {"b": []}}, (1, 2), 2**63, 1e308),
    1e-320,
]


@pytest.mark.parametrize("place", list(EVERY), ids=".".join)
def test_what_is_accepted_is_written_and_read_back_as_it_is(place: Place) -> None:
    for value in WEIRD:
        try:
            config = from_mapping(TrainConfig, with_setting(place, value))
        except ConfigError as error:
            refusal = str(error)
        else:
            refusal, stored = "", to_mapping(config)
            for part in place:
                stored = stored[0][part] if isinstance(stored, list) else stored[part]
            again = plain(read_yaml(dump_yaml({"value": stored})))["value"]
            assert from_mapping(TrainConfig, with_setting(place, again)) == config, value
        assert harmless(refusal) == refusal and len(refusal) < 800


# ---------------------------------------------------------------------------------------- files

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {k: x}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30))
RUN = "model: m\noutput_dir: o\ntrain_data: d\n"
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; missing setting 'model'"),
        ("# nothing\n---\n", "is empty"),
        ("null", "is empty"),
        ("- model", "holds a list; the top level must be a mapping of settings"),
        ("model", "holds a single value; the top level must be a mapping"),
        ("42", "holds a single value"),
        ("model:\tm\n", "line 1, column 7: .*indent with spaces, not with tabs"),
        ("debate:\n\trounds: 1\n", "line 2, column 1: .*indent with spaces, not with tabs"),
        ("model: m\nmodel: n\n", "the setting 'model' is given twice, near line 2"),
        ("debate: {1: a, '1': b}", "the setting '1' is given twice"),
        ("? [a]\n: 1", "a key is empty, or no text, near line 1"),
        (": 1", "not valid YAML|a key is empty"),
        ("1: x", "unknown setting '1'"),
        ("on: x", "unknown setting 'on'"),
        ("model: &a [*a]", "the alias near line 1 stands for what it is part of"),
        ("model: *a", "undefined alias"),
        (BOMB, "more than 20000 values; aliases count as what they stand for"),
        (MERGES, "more than 20000 values"),
        (CHAIN, "more than 40 levels of nesting"),
        ("model: " + "[" * 100_000, "more than 40 levels of nesting"),
        ("- " * 100_000, "more than 40 levels of nesting"),
        ("? " * 100_000, "more than 40 levels of nesting"),
        ("".join(f"k{i}: x\n" for i in range(25_000)), "more than 20000 values"),
        ("x" * 300_000, "more than 262144 bytes"),
        ("model: !!python/object/apply:os.system [ls]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("model: !!binary aGk=", "the tag .*binary.* settings are plain values"),
        ("max_steps: !!int abc", "the tag .*int"),
        ("model: m\n---\nmodel: n\n", "another document"),
        (RUN + "max_steps: " + "9" * 5000, "a number of 5000 characters, near line 4"),
        (RUN + "max_steps: 1e999", "max_steps=1e999 has the wrong type; expected int"),
        (RUN + "max_steps: 010", "max_steps=010 could be an octal number"),
        (RUN + "max_steps: 12:30", "max_steps='12:30' has the wrong type"),
        (RUN + "max_steps: yes", "max_steps=yes has the wrong type"),
        (RUN + "max_steps: 2024-01-01", "max_steps='2024-01-01' has the wrong type"),
        (RUN + "learning_rate: .inf", "learning_rate=inf is not possible; .* at most 10"),
        (RUN + "learning_rate: .nan", "learning_rate=nan is not possible"),
        ('model: "\\ud800"\noutput_dir: o\ntrain_data: d', r"model holds the character \\ud800"),
        ('model: "a\\0"\noutput_dir: o\ntrain_data: d', r"model holds the character \\x00"),
        ('model: "\\Uffffffff"', "a value cannot be read"),
        ("model: \x1b[31m", r"character 8 is U\+001B"),
        (bytes(range(256)), "not a text file in UTF-8"),
        ("model: m".encode("utf-16"), "not a text file in UTF-8"),
    ],
)  # fmt: skip
def test_a_file_of_settings_that_cannot_be_meant(
    tmp_path: Path, content: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    begin = time.monotonic()
    assert main(["train", "--config", str(file)]) == 2
    assert time.monotonic() - begin < 30
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1 and "Traceback" not in said


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "x", "exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(str(path))


def test_a_broken_line_is_named_but_not_repeated(tmp_path: Path) -> None:
    """It may hold a secret."""
    (tmp_path / "run.yaml").write_text("model: m\napi_key: sk-secret: x\n")
    with pytest.raises(ConfigError, match="line 2, column 19") as refused:
        load_config(str(tmp_path / "run.yaml"))
    assert "sk-secret" not in str(refused.value)


def test_text_is_what_was_written_whatever_yaml_reads_in_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: 007\noutput_dir: 2024-01-01\ntrain_data: [1.10, 12:30:45]\nrun_name: no\n"
        "teachers: [{model: 1e3, key: [1_000, 0x10, on]}]\ndivergence: {1.10: jsd, on: jsd, default: jsd}\n"
        "method_options: {small: 1e-5, day: 2024-01-01, time: 12:30, zip: 010, flag: yes, n: 0x10}\n"
    )
    config = load_config(str(tmp_path / "run.yaml"))
    assert (config.model, config.output_dir, config.run_name) == ("007", "2024-01-01", "no")
    assert config.train_data == ["1.10", "12:30:45"]
    assert (config.teachers[0].model, config.teachers[0].key) == ("1e3", ["1_000", "0x10", "on"])
    assert set(config.divergence) == {"1.10", "on", "default"}
    assert config.method_options == {
        "small": 1e-5, "day": "2024-01-01", "time": "12:30", "zip": "010", "flag": True, "n": 16,
    }  # fmt: skip
    assert plain(read_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}")) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_what_aliases_share_can_be_changed_in_one_place(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN + "teachers: [&t {model: a}, *t]\n")
    config = load_config(str(tmp_path / "run.yaml"), ["--teachers.1.model", "b"])
    assert [t.model for t in config.teachers] == ["a", "b"]


# ---------------------------------------------------------------------------------- command line

FULL = ["--model", "m", "--output_dir", "o", "--train_data", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_steps"], "--max_steps needs a value: --max_steps VALUE"),
        (["--run_name", "--bf16"], "--run_name needs a value"),
        (["--debate.rounds="], "--debate.rounds= needs a value"),
        (["--save_total_limit="], "--save_total_limit= needs a value"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice; give it once"),
        (["--max-steps", "1", "--max_steps", "2"], "--max_steps is given twice"),
        (["--debate.rounds", "3", "--debate", "{tau: 1}"], "--debate would undo --debate.rounds before it"),
        (["\u2014max_steps", "3"], "a dash that is none of the keyboard's; write -- in its place"),
        (["\u2013-max_steps", "3"], "a dash that is none"),
        (["--", "x"], "names no setting"),
        (["--.x", "1"], "names no setting"),
        (["--a..b", "1"], "names no setting"),
        (["--a" + ".a" * 5000, "1"], "names no setting"),
        (["--teachers.99999999999999999999.model", "t"], "not a position in a list of 0"),
        (["--teachers.\u0663.model", "t"], "unknown setting"),
        (["--conf", "run.yaml"], "did you mean '--config'"),
        (["--api_key", "x"], "keys are no settings: name the environment variable"),
        (["--method_options.x", "&a [*a]"], "stands for what it is part of"),
        (["--method_options.x", "!!python/name:os.system"], "the tag"),
        (["--method_options.x", "[" * 1000], "more than 40 levels"),
        (["--max_steps", "9" * 5000], "a number of 5000 characters"),
        (["--vllm_server_base_url", "http://h:99999999"], "vllm_server_base_url=.*write http://host:port"),
        (["--teachers.0.model", "t", "--teachers.0.base_url", "http://[::1"], "base_url=.*give a URL"),
        (["--teachers.0.model", "t", "--teachers.0.base_url", "http://h:port/v1"], "base_url=.*give a URL"),
        (["--teachers.0.model", "t", "--teachers.0.base_url", "file:///etc/passwd"], "base_url=.*give a URL"),
        (["--output_dir", "~no_such_user/x"], "there is no user 'no_such_user'"),
        (["--num_generations", "1000000000"], "a step has more than 10000000 rollouts"),
        (["--temperature", "1e-300"], "temperature=1e-300 .*it must be 0 .greedy. or lie between 0.01 and 100"),
        (["--environment.name", HOUSE, "--environment.eval_temperatures", "[0, .nan]"], "eval_temperatures="),
        (["--teachers.0.model", "t", "--teachers.0.weight", ".inf"], "teachers.0.weight=inf is not possible"),
    ],
)  # fmt: skip
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [a for pair in zip(FULL[::2], FULL[1::2], strict=True) for a in pair if pair[0] not in arguments]
    assert main(["train", *given, *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1 and len(said) < 600


def test_arguments_that_are_text_stay_what_was_typed() -> None:
    given = ["[/x]", "a #b", "no", "007", "1e3", "{a: b}", "&x", "*x", "null-ish", "a: b", "12:30", "- a", "%", "@x"]
    for text in given:
        assert load_config(None, [*FULL, "--run_name", text]).run_name == text
    assert load_config(None, [*FULL, "--divergence.my-task", "jsd", "--divergence.default", "jsd"]).divergence_of(
        "my-task"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command; for example: opdengine train --config run.yaml"),
        (["debate"], "--prompt; for example: opdengine debate --config run.yaml --prompt TEXT"),
        (["balance"], "--output; for example: opdengine balance --config"),
        (["vllm-serve"], "--model; for example: opdengine vllm-serve --model"),
        (["train", "--config", "a", "--config", "b"], "--config is given twice"),
        (["plan", "--gpus", "many"], "invalid int value: 'many'"),
        (["settings", "--tcod"], "unrecognized arguments: --tcod"),
        (["doctor", "\x1b[31m"], r"unrecognized arguments: \\x1b"),
    ],
)
def test_commands_say_what_to_add(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300"])
@pytest.mark.parametrize("name", ["network", "mean_prompt", "mean_completion", "mean_turn"])
def test_a_plan_of_nothing(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FULL, f"--{name}", value]) == 2
    assert f"--{name} " in capsys.readouterr().err


# --------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "API-KEY", "x-api-key", "token", "hf_token", "accessToken", "Authorization", "password",
     "db_password", "client_secret", "private_key", "OPENAI_API_KEY", "cookie", "credentials", "auth"],
)  # fmt: skip
def test_secrets_are_refused_under_any_name(name: str) -> None:
    for place, inner in (
        ("environment.options", {"name": HOUSE, "options": {name: "v4lue"}}),
        ("environment.options", {"name": HOUSE, "options": {"client": {"extra_headers": [{name: "v4lue"}]}}}),
        ("environment.options", {"name": HOUSE, "options": {name: {"env": ["v4lue"]}}}),
    ):
        data = {"model": "m", "output_dir": "o", "environment": inner}
        with pytest.raises(ConfigError, match=place) as refused:
            from_mapping(TrainConfig, data)
        assert "v4lue" not in str(refused.value) and name in str(refused.value)
    for section in ("method_options", "chat_template_kwargs"):
        with pytest.raises(ConfigError, match=f"{section}.{name} looks like a secret"):
            from_mapping(TrainConfig, {**NEEDED, section: {name: "v4lue"}})


@pytest.mark.parametrize(
    "name", ["max_tokens", "eos_token", "think_end_token", "tokenizer", "author", "answer_key", "tokens", "key", "keys"]
)
def test_names_that_only_sound_like_secrets(name: str) -> None:
    assert not names_secret(name)
    assert from_mapping(TrainConfig, {**NEEDED, "chat_template_kwargs": {name: "x"}})


def test_no_setting_is_called_like_a_secret() -> None:
    assert [place for place in EVERY if names_secret(place[-1]) and place[-1] != "api_key_env"] == []


@pytest.mark.parametrize(
    "text",
    ["https://user:pw@host/x", "see https://h/x?token=abc", "http://h/?api_key=a&b=1", "https://h/d?sig=abc",
     "sk-abcdefghijklmnop1234", "hf_" + "a" * 30, "Bearer abcdefghijklmnop1234", "ghp_" + "a" * 30, "AKIA" + "A" * 16],
)  # fmt: skip
@pytest.mark.parametrize("place", [("run_name",), ("train_data", "path"), ("model",), ("vllm_server_base_url",)])
def test_credentials_inside_text_are_refused(place: Place, text: str) -> None:
    assert holds_secret(text)
    with pytest.raises(ConfigError, match=place[-1]) as refused:
        from_mapping(TrainConfig, with_setting(place, text))
    assert text not in str(refused.value)


def test_a_key_in_the_place_of_its_variable_is_not_repeated() -> None:
    teacher = {"model": "t", "base_url": "http://h/v1", "api_key_env": "sk-12-ab"}
    with pytest.raises(ConfigError, match="is the name of an environment variable") as refused:
        from_mapping(TrainConfig, {**NEEDED, "teachers": [teacher]})
    assert "sk-12-ab" not in str(refused.value)


# -------------------------------------------------------------------------------------- messages


def test_messages_are_short_and_harmless() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**100_000, "x" * 10**6, {"a": deep}, "\x1b]0;title\x07\u202e", [[10**5000] * 100] * 100):
        assert len(brief(value)) < 1000 and harmless(brief(value)) == brief(value)
    assert harmless("a\x1b[2J\x9b1m\r\x08b\u202ec\ud800\td\n") == "a\\x1b[2J\\x9b1m\\r\\x08b\\u202ec\\ud800\td\n"


@pytest.mark.parametrize("place", [("output_dir",), ("model",), ("debate", "cache_dir"), ("teachers", "model")])
@pytest.mark.parametrize("path", ["$HOME/runs", "${HOME}/runs", "/data/$USER", "runs/${RUN}"])
def test_variables_of_the_shell_are_not_taken_for_names(place: Place, path: str) -> None:
    with pytest.raises(ConfigError, match="variables of the shell are not filled in here; write the path out"):
        from_mapping(TrainConfig, with_setting(place, path))


def test_a_template_may_hold_what_looks_like_a_variable() -> None:
    for template in ("{{ x }} costs $HOME", "$HOME/x\n{% if y %}"):
        assert from_mapping(TrainConfig, {**NEEDED, "chat_template": template}).chat_template == template
