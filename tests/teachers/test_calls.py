"""Single calls to a served teacher, against a server process with scripted faults."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from teacher_helpers import Server, context, serve, served

from opdengine.config.train import ConfigError
from opdengine.teachers import TeacherError
from opdengine.teachers.endpoint import Endpoint
from opdengine.types import Completion, Failure, Request, SamplingParams, TopK

PARAMS = SamplingParams(
    max_tokens=5, temperature=0.7, top_p=0.9, top_k=7, repetition_penalty=1.1, stop=("END",), seed=3
)
IDS = [40, 41, 42, 43, 44, 45]


def score(teacher: Any, count: int = 1) -> list[TopK | Failure]:
    return list(asyncio.run(teacher.score([context(IDS, 3)] * count)))


def generate(teacher: Any, count: int = 1) -> list[Completion | Failure]:
    requests = [Request(f"r{i}", (*IDS, 50 + i), seed=i) for i in range(count)]
    return list(asyncio.run(teacher.generate(requests, PARAMS)))


FAULTS = {
    "500": "http_500", "503": "http_503", "429": "http_429", "hang": "timeout", "half_json": "bad_json",
    "cut_off": "connection", "garbage": "bad_json", "wrong_ids": "wrong_ids",
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_is_retried_and_leaves_no_trace(bigrams: Server, tokenizer: Any, kind: str) -> None:
    teacher = served(bigrams, tokenizer, timeout=1.5 if kind == "hang" else 20.0)
    bigrams.control(say="hello")
    (want,), (text,) = score(teacher), generate(teacher)
    assert isinstance(want, TopK) and isinstance(text, Completion) and text.text == "hello"
    bigrams.control(say="hello", faults=[{"kind": kind, "times": 2, "on": on} for on in ("score", "generate")])
    (got,), (again,) = score(teacher), generate(teacher)
    assert isinstance(got, TopK) and isinstance(again, Completion)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.logprobs, want.logprobs)
    assert again.text == "hello" and again.token_ids.tolist() == text.token_ids.tolist()
    assert teacher.counts() == {"teacher_retries/served": 4.0}
    assert teacher.counts() == {}


@pytest.mark.parametrize(("kind", "reason"), [*FAULTS.items(), ("no_logprobs", "no_logprobs")])
def test_a_lasting_fault_of_scoring_is_a_failure_by_reason(
    bigrams: Server, tokenizer: Any, kind: str, reason: str
) -> None:
    bigrams.control(faults=[{"kind": kind}])
    (failure,) = score(served(bigrams, tokenizer, timeout=0.3 if kind == "hang" else 20.0))
    assert isinstance(failure, Failure) and failure.reason == reason
    assert "attempt 3 of 3" in failure.detail and bigrams.seen["score"] == 3
    with pytest.raises(TeacherError, match=f"'served' failed .{reason}"):
        score(served(bigrams, tokenizer, timeout=0.3 if kind == "hang" else 20.0, stop=True, max_retries=0))


@pytest.mark.parametrize(("kind", "reason"), [*FAULTS.items(), ("no_text", "bad_answer")])
def test_a_lasting_fault_of_writing_is_never_text(bigrams: Server, tokenizer: Any, kind: str, reason: str) -> None:
    bigrams.control(say="hello", faults=[{"kind": kind}])
    teacher = served(bigrams, tokenizer, timeout=0.3 if kind == "hang" else 20.0)
    (failure,) = generate(teacher)
    assert isinstance(failure, Failure) and failure.reason == reason
    assert teacher.counts() == {f"teacher_failures/served/{reason}": 1.0, "teacher_retries/served": 2.0}


def test_a_refusal_is_not_retried(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(window=len(IDS))
    (failure,) = score(served(bigrams, tokenizer))
    assert isinstance(failure, Failure) and failure.reason == "http_400" and "maximum model length" in failure.detail
    assert bigrams.seen["score"] == 1


def test_the_servers_own_wish_to_wait_is_granted(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(faults=[{"kind": "429", "times": 1, "retry_after": 1}])
    start = time.monotonic()
    assert isinstance(score(served(bigrams, tokenizer))[0], TopK)
    assert time.monotonic() - start >= 1.0


def test_the_other_calls_of_a_batch_survive_one_failure(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(faults=[{"kind": "500", "after": 2, "times": 1}])
    results = score(served(bigrams, tokenizer, max_retries=0, max_concurrency=1), count=5)
    assert [isinstance(r, Failure) for r in results] == [False, False, True, False, False]


def test_calls_run_at_the_same_time_up_to_the_bound(tokenizer: Any) -> None:
    with serve(len(tokenizer)) as server:
        server.control(pause=0.1)
        score(served(server, tokenizer, max_concurrency=3), count=9)
        assert server.seen["most_at_once"] == 3


def test_a_dead_server_costs_one_round_of_retries(tokenizer: Any) -> None:
    with serve(len(tokenizer)) as server:
        server.control(faults=[{"kind": "die"}])
        teacher = served(server, tokenizer, max_concurrency=2)
        start = time.monotonic()
        results = score(teacher, count=40)
        assert time.monotonic() - start < 20
    assert {r.reason for r in results if isinstance(r, Failure)} == {"connection"} and len(results) == 40
    counts = teacher.counts()
    assert counts["teacher_failures/served/connection"] == 40.0
    assert counts["teacher_retries/served"] <= 2 * 2


def test_the_end_of_a_turn_is_sent_where_it_is_not_the_eos_token(bigrams: Server, tiny: Any) -> None:
    tokenizer = tiny.make_tokenizer(("<|end|>",))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    bigrams.control(say="hello")
    (written,) = generate(served(bigrams, tokenizer))
    (body,) = bigrams.seen["bodies"]
    assert body["stop_token_ids"] == [end]
    # This server tells no ids: what it wrote ended as the template ends it.
    assert isinstance(written, Completion) and written.token_ids.tolist() == [*tokenizer.encode("hello"), end]


def test_halves_of_characters_in_a_teachers_text_are_replaced(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(say="cut \ud83d text")
    (written,) = generate(served(bigrams, tokenizer))
    assert isinstance(written, Completion) and written.text == "cut \ufffd text"
    assert tokenizer.decode(written.token_ids[:-1]) == "cut \ufffd text"


def test_what_is_sent(bigrams: Server, tokenizer: Any) -> None:
    """Everything that shapes the sample is stated, so that no default of the server steps in."""
    bigrams.control(say="hello")
    generate(served(bigrams, tokenizer), count=2)
    bodies = bigrams.seen["bodies"]
    assert len({b.pop("seed") for b in bodies}) == 2
    assert bodies[0] == {
        "model": "tiny", "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.1,
        "stop": ["END"], "return_token_ids": True,
    }  # fmt: skip


def test_the_key_comes_from_the_named_variable_and_from_nowhere_else(
    bigrams: Server, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    monkeypatch.setenv("MY_KEY", "secret")
    bigrams.control()
    score(served(bigrams, tokenizer))
    score(served(bigrams, tokenizer, api_key_env="MY_KEY"))
    assert bigrams.seen["authorization"] == ["Bearer none", "Bearer secret"]
    with pytest.raises(ConfigError, match="'NO_SUCH_KEY' named by api_key_env is not set"):
        served(bigrams, tokenizer, api_key_env="NO_SUCH_KEY")


def test_token_ids_come_from_the_server_where_it_tells_them(real_server: Server, tokenizer: Any) -> None:
    real_server.control()
    teacher = served(real_server, tokenizer)
    results = generate(teacher, count=3)
    for result in results:
        assert isinstance(result, Completion)
        assert 1 <= len(result.token_ids) <= 5 and len(result.logprobs) == len(result.token_ids)
        assert result.stop_reason == ("stop" if result.token_ids[-1] == tokenizer.eos_token_id else "length")
    assert len({tuple(r.token_ids) for r in results if isinstance(r, Completion)}) > 1
    again = generate(teacher, count=3)
    assert [list(r.token_ids) for r in again] == [list(r.token_ids) for r in results]  # type: ignore[union-attr]


def test_a_crash_is_told_with_what_it_said_first(tokenizer: Any) -> None:
    with serve(len(tokenizer)) as server:
        server.control(faults=[{"kind": "500", "times": 1}, {"kind": "die"}])
        (failure,) = score(served(server, tokenizer))
    assert isinstance(failure, Failure) and failure.reason == "connection"
    assert "at first http_500" in failure.detail and "scripted 500" in failure.detail


def test_a_server_on_this_machine_is_not_asked_by_way_of_a_proxy(
    bigrams: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters set one for everything; of another server a failure names it, without its password."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")

    def models(url: str) -> Any:
        return asyncio.run(Endpoint("t", url, max_retries=0, timeout=20).request("get", "/models"))

    assert models(bigrams.url)["data"]
    assert models(bigrams.url.replace("127.0.0.1", "localhost"))["data"]
    failure = models("http://teacher.invalid:8000/v1")
    assert isinstance(failure, Failure) and failure.reason == "connection"
    assert "http://teacher.invalid:8000/v1 (by way of the proxy 127.0.0.1:9; no_proxy" in failure.detail
    assert "secret" not in failure.detail
    monkeypatch.setenv("no_proxy", "teacher.invalid")
    assert "proxy" not in models("http://teacher.invalid:8000/v1").detail
