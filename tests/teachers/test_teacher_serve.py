"""``opdengine teacher-serve``: who may ask, and what it does with questions that are none."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_helpers import Spoiled, answering, contexts, plain, remote, teacher_serve

from opdengine.cli import main
from opdengine.errors import ConfigError, ProbeError
from opdengine.teachers.serve import MOST_BYTES, Handler, read_token, require_safe, server_of
from opdengine.teachers.served_model import Served
from opdengine.types import Hidden

TOKEN = "a-token-of-the-test-0123456789"
CONTEXT = {"name": "c", "ids": [40, 41, 42, 43], "targets": [1, 2, 3]}
SAMPLING = {
    "max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "stop": [], "seed": 0,
    "stop_token_ids": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def served(models: dict[str, str]) -> Served:
    return Served(models["big"], max_tokens=64)


@pytest.fixture(scope="module")
def open_one(served: Served) -> Iterator[str]:
    with answering(served) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(served: Served) -> Iterator[str]:
    with answering(served, TOKEN) as url:
        yield url


def ask(url: str, path: str, question: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and line of an answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    body = question if isinstance(question, bytes) else None if question is None else json.dumps(question).encode()
    kinds = {} if body is None else {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, body, {**kinds, **headers})
    response = connection.getresponse()
    line = json.loads(response.read().split(b"\n")[0])
    connection.close()
    return response.status, line


# ----------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("path", ["/about", "/head", "/score", "/generate", "/nowhere"])
@pytest.mark.parametrize("given", ["", "Bearer", "Bearer x", TOKEN, f"Bearer {TOKEN}x", f"bearer {TOKEN}", "Bearer ä"])
def test_nothing_is_answered_without_the_token(guarded: str, path: str, given: str) -> None:
    question = None if path in ("/about", "/head") else {"contexts": [CONTEXT], "dtype": "auto"}
    headers = {"Authorization": given} if given else {}
    assert ask(guarded, path, question, **headers) == (401, {"error": "this server asks for its token"})


def test_the_token_opens_it_and_is_told_to_nobody(
    models: dict[str, str], guarded: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEACHER", TOKEN)
    teacher = remote(models["big"], guarded, api_key_env="TEACHER")
    asyncio.run(teacher.probe(judges=True))
    assert all(isinstance(found, Hidden) for found in asyncio.run(teacher.score(contexts())))
    for settings, words in (({}, "http_401.*its token.*api_key_env"), ({"api_key_env": "OTHER"}, "http_401")):
        monkeypatch.setenv("OTHER", "another-token-of-the-test")
        with pytest.raises(ProbeError, match=words) as refused:
            asyncio.run(remote(models["big"], guarded, **settings).probe(judges=True))
        assert TOKEN not in str(refused.value) and "another-token" not in str(refused.value)
    said = capsys.readouterr()
    assert TOKEN not in caplog.text + said.out + said.err + repr(teacher.config)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "teacher.example"])
def test_other_machines_need_a_token(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"must carry a token.*--token_env or --token_file"):
        require_safe(host, None)
    require_safe(host, TOKEN)
    assert main(["teacher-serve", "--model", "/nowhere", "--host", host]) == 2
    assert "must carry a token" in capsys.readouterr().err  # before anything is loaded


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_needs_none(host: str) -> None:
    require_safe(host, None)


@pytest.mark.parametrize(
    ("variable", "value", "file", "words"),
    [
        ("T", TOKEN, "x", "both given"),
        ("T", None, None, "'T' of --token_env is not set or empty"),
        ("T", "", None, "not set or empty"),
        ("T", "short", None, "fewer than 16 characters"),
        ("T", "a token with blanks in it", None, "holds a blank"),
        ("T", "ein-Schlüssel-mit-Umlaut", None, "holds a blank or another character"),
        (TOKEN, None, None, "is the name of an environment variable"),
        (None, None, "/nowhere/at/all", "cannot be read: No such file"),
        (None, None, "", "not set or empty"),
        (None, None, "short", "fewer than 16"),
    ],
)
def test_tokens_that_are_none(
    variable: str | None, value: str | None, file: str | None, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if value is not None:
        monkeypatch.setenv("T", value)
    place = file
    if file is not None and not file.startswith("/"):
        (tmp_path / "token").write_text(file)
        place = str(tmp_path / "token")
    with pytest.raises(ConfigError, match=words) as refused:
        read_token(variable, place)
    assert TOKEN not in str(refused.value) and (not value or value not in str(refused.value))


def test_where_tokens_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T", TOKEN)
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert read_token("T", None) == read_token(None, str(tmp_path / "token")) == TOKEN
    assert read_token(None, None) is None


# -------------------------------------------------------------------------------------------- questions


def writing(count: int = 1, **changes: Any) -> dict[str, Any]:
    """A question to go on with prompts of one token."""
    prompts = [{"name": "r", "ids": [40], "seed": 1}] * count
    return {"requests": prompts, "sampling": {**SAMPLING, **changes}}


WRONG = (
    {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"stop": [""]}, {"seed": "1"},
    {"repetition_penalty": 0}, {"stop_token_ids": [-1]},
)  # fmt: skip
QUESTIONS: list[tuple[str, Any, int, str]] = [
    ("/score", b"", 400, "Invalid JSON"),
    ("/score", b"{", 400, "Invalid JSON"),
    ("/score", b"\xff\xfe", 400, "Invalid JSON"),
    ("/score", [], 400, "a question that is none"),
    ("/score", {"contexts": [], "dtype": "auto"}, 400, "contexts"),
    ("/score", {"contexts": [CONTEXT]}, 400, "dtype"),
    ("/score", {"contexts": [CONTEXT], "dtype": "int8"}, 400, "dtype"),
    ("/score", {"contexts": [CONTEXT], "dtype": "auto", "more": 1}, 400, "more"),
    ("/score", {"contexts": [{**CONTEXT, "ids": []}], "dtype": "auto"}, 400, "ids"),
    ("/score", {"contexts": [{**CONTEXT, "ids": [40, -1]}], "dtype": "auto"}, 400, "ids"),
    ("/score", {"contexts": [{**CONTEXT, "ids": [40, 1.5]}], "dtype": "auto"}, 400, "ids"),
    ("/score", {"contexts": [{**CONTEXT, "ids": ["40"]}], "dtype": "auto"}, 400, "ids"),
    ("/score", {"contexts": [{**CONTEXT, "ids": [40, 41, 42, 10**6]}], "dtype": "auto"}, 422, "'c' has the token id"),
    ("/score", {"contexts": [{**CONTEXT, "ids": [40] * 2000}], "dtype": "auto"}, 422, "'c' has 2000 tokens"),
    *(("/score", {"contexts": [{**CONTEXT, "targets": t}], "dtype": "auto"}, 422, "'c': targets do not ascend")
      for t in ([0, 1], [1, 4], [2, 1], [1, 1])),
    ("/score", {"contexts": [{**CONTEXT, "ids": [40] * 40}] * 2, "dtype": "auto"}, 413, "80 tokens in one question"),
    ("/score", {"contexts": [{**CONTEXT, "name": "x" * 201}], "dtype": "auto"}, 400, "name"),
    ("/generate", {"requests": [], "sampling": SAMPLING}, 400, "requests"),
    *(("/generate", writing(**wrong), 400, next(iter(wrong))) for wrong in WRONG),
    ("/generate", writing(max_tokens=5000), 422, "prompt 'r' has 1 tokens and may be continued by 5000"),
    ("/generate", writing(3, max_tokens=200), 413, "603 tokens in one question, which may have 256"),
    ("/nowhere", {}, 404, "there is no '/nowhere'"),
    ("/about", {}, 404, "there is no '/about'"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "question", "status", "words"), QUESTIONS)
def test_questions_that_are_none(open_one: str, path: str, question: Any, status: int, words: str) -> None:
    found, line = ask(open_one, path, question)
    assert found == status and words in line["error"], line
    assert len(line["error"]) < 700


def test_a_question_has_a_type_and_a_bounded_length(open_one: str) -> None:
    good = {"contexts": [CONTEXT], "dtype": "auto"}
    assert ask(open_one, "/score", good)[0] == 200
    # What a page in a browser can send without being asked first.
    assert ask(open_one, "/score", good, **{"Content-Type": "text/plain"})[0] == 415
    for length, status in ((str(2 * MOST_BYTES), 413), ("9" * 400, 411), ("-1", 411), ("x", 411)):
        with socket.create_connection(("127.0.0.1", int(open_one.rsplit(":", 1)[1])), 20) as raw:
            fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
            raw.sendall(f"POST /score HTTP/1.1\r\n{fields}\r\n\r\n".encode())
            assert f" {status} ".encode() in raw.recv(4096)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "", "[", "127.0.0.1.evil.example", "a@b:c"])
def test_a_name_that_leads_here_opens_nothing(open_one: str, guarded: str, host: str) -> None:
    """Of a page in a browser, whose own name may be made to lead to this machine."""
    status, line = ask(open_one, "/about", Host=host)
    assert status == 403 and "no token" in line["error"]
    assert ask(guarded, "/about", Host=host, Authorization=f"Bearer {TOKEN}")[0] == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8765"])
def test_the_names_of_this_machine_do(open_one: str, host: str) -> None:
    assert ask(open_one, "/about", Host=host)[0] == 200


def test_a_slow_way_takes_a_large_head(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for a client that takes nothing, not for the whole answer."""
    monkeypatch.setattr(Handler, "timeout", 0.6)
    spoiled = Spoiled(served, plain)
    spoiled.send_head = lambda: ({}, [torch.zeros(24 << 20, dtype=torch.uint8)])  # type: ignore[attr-defined]
    with answering(spoiled) as url, socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 20) as raw:
        raw.sendall(b"GET /head HTTP/1.1\r\nHost: localhost\r\n\r\n")
        taken = 0
        while data := raw.recv(1 << 20):
            taken += len(data)
            time.sleep(0.05)
    assert taken > 24 << 20


def test_nobody_is_answered_who_has_gone(served: Served) -> None:
    """The model is not kept busy by a trainer that was killed."""
    asked = json.dumps({"contexts": [CONTEXT], "dtype": "auto"}).encode()
    with pytest.raises(ConnectionAbortedError):
        served.score(asked, lambda: False)
    assert len(served.score(asked, lambda: True)[1][0]) == 3


def test_many_may_come_at_once(models: dict[str, str], open_one: str) -> None:
    """As the processes of a run do; the server holds two answers, and the others wait."""

    async def all_at_once() -> None:
        teachers = [remote(models["big"], open_one) for _ in range(6)]
        await asyncio.gather(*(t.probe(judges=True) for t in teachers))
        for found in await asyncio.gather(*(t.score(contexts(9)) for t in teachers)):
            assert all(isinstance(f, Hidden) for f in found)

    asyncio.run(all_at_once())


# -------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port 70000 is no port"),
        (["--max_tokens_per_batch", "1"], "--max_tokens_per_batch 1 is not possible"),
        (["--token", "x"], "unrecognized arguments: --token x"),
        (["--token_env", "not a name"], "--token_env is the name of an environment variable"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_arguments_that_are_not_possible(
    models: dict[str, str], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["teacher-serve", "--model", models["big"], *arguments])
    except SystemExit as leaving:
        status = int(str(leaving.code))
    assert status == 2 and words in capsys.readouterr().err


def test_a_taken_port_is_said(served: Served, open_one: str) -> None:
    port = int(open_one.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port} is not possible .*choose another address"):
        server_of(served, "127.0.0.1", port, None)


def test_a_model_without_a_chat_template_can_be_served(models: dict[str, str], tmp_path: Path) -> None:
    """Trainers render the chats; the name is the folder's, also that of a link."""
    folder = Path(shutil.copytree(models["big"], tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "big").symlink_to(folder)
    with answering(Served(str(tmp_path / "big"))) as url:
        asyncio.run(remote(models["big"], url).probe(judges=True))


def test_the_command_serves_with_a_token(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER", TOKEN)
    with teacher_serve(models["small"], "--dtype", "bfloat16", "--token_env", "TEACHER") as server:
        assert ask(server.url, "/about")[0] == 401
        teacher = remote(models["small"], server.url, api_key_env="TEACHER")
        asyncio.run(teacher.probe(judges=True))
        assert str(teacher.about.dtype) == "torch.bfloat16"
        with open(f"/proc/{server.process.pid}/cmdline", "rb") as command:
            assert TOKEN.encode() not in command.read()
