"""Servers of exact teachers that are dead, slow or lying: others take over, or the failure is named."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hostile_http import REASONS, SECRET, hostile_server, mutations
from remote_helpers import Spoiled, answering, contexts, nobody, plain, remote

from opdengine.errors import ProbeError
from opdengine.teachers import TeacherError
from opdengine.teachers.about import About
from opdengine.teachers.endpoint import BadAnswer
from opdengine.teachers.exchange import _answer
from opdengine.teachers.pool import OtherWeightsError
from opdengine.teachers.remote import RemoteTeacher, _expect_written, parts_of
from opdengine.teachers.served_model import RefusedError, Reply, Served
from opdengine.types import Failure, Hidden, Request, SamplingParams
from opdengine.workers.printing import harmless


@pytest.fixture(scope="module")
def served(models: dict[str, str]) -> Served:
    return Served(models["big"], max_tokens=64)


def probed(teacher: RemoteTeacher, judges: bool = True) -> RemoteTeacher:
    asyncio.run(teacher.probe(judges=judges))
    return teacher


def states(found: Sequence[Any]) -> list[torch.Tensor]:
    assert all(isinstance(f, Hidden) for f in found), found
    return [f.states for f in found]


@pytest.fixture(scope="module")
def expected(served: Served, models: dict[str, str]) -> list[torch.Tensor]:
    with answering(served) as url:
        return states(asyncio.run(probed(remote(models["big"], url)).score(contexts())))


def slow(reply: Reply) -> Reply:
    time.sleep(2.0)
    return reply


def cut(reply: Reply) -> Reply:
    raise ConnectionAbortedError("as if the process had died")


def broken(reply: Reply) -> Reply:
    raise RuntimeError("out of memory")


FAULTS: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "slow": (slow, "timeout"),
    "cut": (cut, "connection"),
    "broken": (broken, "http_500"),
    "too few rows": (lambda r: (r[0], [r[1][0][1:], *r[1][1:]]), "wrong_shape"),
    "too few contexts": (lambda r: (r[0], r[1][1:]), "wrong_shape"),
    "too many": (lambda r: (r[0], [*r[1], r[1][0]]), "wrong_shape"),
    "another width": (lambda r: (r[0], [t[:, 1:] for t in r[1]]), "wrong_shape"),
    "another dtype of the same size": (lambda r: (r[0], [t.view(torch.int32) for t in r[1]]), "wrong_shape"),
    "columns for rows": (lambda r: (r[0], [t.t().contiguous() for t in r[1]]), "wrong_shape"),
    "another dtype": (lambda r: (r[0], [t.double() for t in r[1]]), "wrong_shape"),
    "a long line": (lambda r: ({"x": "x" * (5 << 20)}, r[1]), "too_large"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_server_takes_over_and_it_is_said(
    models: dict[str, str], served: Served, expected: list[torch.Tensor], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, reason = FAULTS[fault]
    with answering(Spoiled(served, spoil)) as bad, answering(served) as good:
        teacher = probed(remote(models["big"], bad, good, max_retries=0, timeout=0.7))
        for found, theirs in zip(states(asyncio.run(teacher.score(contexts()))), expected, strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    assert f"teacher 't' has lost {bad} ({reason}: " in caplog.text and f"{good} takes over" in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_without_another_server_the_failure_is_named(models: dict[str, str], served: Served, fault: str) -> None:
    spoil, reason = FAULTS[fault]
    with answering(Spoiled(served, spoil)) as url:
        settings: dict[str, Any] = {"max_retries": 0, "timeout": 0.7}
        stopping = probed(remote(models["big"], url, **settings))
        with pytest.raises(TeacherError, match=rf"teacher 't' failed \({reason}\): .*{url}"):
            asyncio.run(stopping.score(contexts()))
        teacher = probed(remote(models["big"], url, stop=False, **settings))
        found = asyncio.run(teacher.score(contexts()))
        assert [f.reason for f in found if isinstance(f, Failure)] == [reason] * 5
        assert teacher.counts() == {f"teacher_failures/t/{reason}": 5.0}


def test_an_attempt_that_fails_once_is_made_again(
    models: dict[str, str], served: Served, expected: list[torch.Tensor]
) -> None:
    once = iter([broken])
    with answering(Spoiled(served, lambda reply: next(once, plain)(reply))) as url:
        teacher = probed(remote(models["big"], url))
        for found, theirs in zip(states(asyncio.run(teacher.score(contexts()))), expected, strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    assert teacher.counts() == {"teacher_retries/t": 1.0}


def test_all_servers_share_the_work(models: dict[str, str], served: Served) -> None:
    one, other = Spoiled(served, plain), Spoiled(served, plain)
    with answering(one) as first, answering(other) as second:
        asyncio.run(probed(remote(models["big"], first, second)).score(contexts(12)))
    assert one.asked and other.asked


def test_one_question_at_a_time_is_asked_of_any_server(models: dict[str, str], served: Served) -> None:
    most, at_once = [0], [0]

    def counting(reply: Reply) -> Reply:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        at_once[0] -= 1
        return reply

    good = Spoiled(served, counting)
    with answering(Spoiled(served, cut)) as bad, answering(good) as url, answering(good) as other:
        teacher = probed(remote(models["big"], bad, url, other, max_concurrency=1, max_retries=0))
        states(asyncio.run(teacher.score(contexts(12))))
    assert good.asked > 2 and most == [1]


def test_all_dead_names_them_all(models: dict[str, str], served: Served) -> None:
    with answering(served) as first, answering(served) as second:
        teacher = probed(remote(models["big"], first, second, max_retries=1))
    with pytest.raises(TeacherError, match=f"no endpoint answers any more: {first} .*{second} "):
        asyncio.run(teacher.score(contexts()))


def test_a_server_that_comes_back_takes_part_again(
    models: dict[str, str], served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(served) as stays:
        with answering(served) as goes:
            teacher = probed(remote(models["big"], stays, goes, max_retries=0))
        states(asyncio.run(teacher.score(contexts())))
        assert teacher.pool.endpoints[1].lost is not None
        states(asyncio.run(teacher.score(contexts())))  # it is asked whether it is back, and does not hold up anything
        back = Spoiled(served, plain)
        with answering(back, port=int(goes.rsplit(":", 1)[1])):
            for _ in range(50):
                states(asyncio.run(teacher.score(contexts(12))))
                if back.asked:
                    break
    assert back.asked and f"{goes} is back" in caplog.text


@pytest.mark.parametrize("stop", [True, False])
def test_other_weights_end_the_run(models: dict[str, str], served: Served, stop: bool) -> None:
    """Also where failures are dropped: what another teacher says must not be trained on."""
    with answering(served) as url:
        teacher = probed(remote(models["big"], url, stop=stop))
    restarted = Spoiled(served, plain, fingerprint="another")
    with (
        answering(restarted, port=int(url.rsplit(":", 1)[1])),
        pytest.raises(OtherWeightsError, match=f"{url} answers with other weights .* 'another' instead of '.*restart"),
    ):
        asyncio.run(teacher.score(contexts()))


def test_a_refusal_of_other_weights_ends_the_run_too(models: dict[str, str], served: Served) -> None:
    """A smaller model was put there: what it refuses says more of it than of the question."""
    with answering(served) as url:
        teacher = probed(remote(models["big"], url, stop=False))

    def refuse(reply: Reply) -> Reply:
        raise RefusedError(422, "too long for me")

    restarted = Spoiled(served, refuse, fingerprint="another")
    with answering(restarted, port=int(url.rsplit(":", 1)[1])), pytest.raises(OtherWeightsError):
        asyncio.run(teacher.score(contexts()))


def test_an_address_where_another_program_answers_is_lost_at_once(
    models: dict[str, str], served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(served) as goes, answering(served) as stays:
        teacher = probed(remote(models["big"], goes, stays))
        with hostile_server("redirect") as other:
            teacher.pool.endpoints[0].url = other
            states(asyncio.run(teacher.score(contexts())))
    assert f"has lost {other} (http_307: " in caplog.text and "attempt 1 of 3" in caplog.text


def test_a_server_that_was_lost_and_is_another_one_ends_the_run(models: dict[str, str], served: Served) -> None:
    with answering(served) as stays:
        with answering(served) as goes:
            teacher = probed(remote(models["big"], stays, goes, max_retries=0))
        states(asyncio.run(teacher.score(contexts())))
        teacher.pool.endpoints[0].url = "http://127.0.0.1:9"  # so that the other one is needed
        restarted = Spoiled(served, plain, fingerprint="another")
        with answering(restarted, port=int(goes.rsplit(":", 1)[1])), pytest.raises(OtherWeightsError):
            asyncio.run(teacher.score(contexts()))


def test_states_that_are_not_finite_arrive_as_they_are(models: dict[str, str], served: Served) -> None:
    """What becomes of them is decided as for a local teacher."""
    with answering(Spoiled(served, lambda r: (r[0], [t * float("nan") for t in r[1]]))) as url:
        found = states(asyncio.run(probed(remote(models["big"], url)).score(contexts())))
    assert all(t.isnan().all() for t in found)


# --------------------------------------------------------------------------------------- before step 0


def test_a_dead_server_is_said_and_the_others_go_on(
    models: dict[str, str], served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with nobody() as dead, answering(served) as url:
        teacher = probed(remote(models["big"], dead, url, max_retries=1))
        states(asyncio.run(teacher.score(contexts())))
    assert f"teacher 't' goes on without {dead} (connection: " in caplog.text


def test_no_server_at_all(models: dict[str, str]) -> None:
    with nobody() as one, nobody() as other, pytest.raises(ProbeError, match=f"teacher-serve.*{one} .*{other} "):
        probed(remote(models["big"], one, other, max_retries=1))


def test_another_model_tokenizer_or_protocol_is_refused(
    models: dict[str, str], served: Served, tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(served) as url:
        with pytest.raises(ProbeError, match=rf"{url} does not serve 'small' but 'big'; set the teacher's 'model'"):
            probed(remote(models["small"], url))
        tiny.make_tokenizer(("<more>",)).save_pretrained(tmp_path / "other")
        with pytest.raises(ProbeError, match=r"has another tokenizer than '.*other'.*set the teacher's 'tokenizer'"):
            probed(remote(models["big"], url, tokenizer=str(tmp_path / "other")))
        other = Spoiled(served, plain, fingerprint="another")
        differ = r"do not serve the same \(what differs: fingerprint\)"
        with answering(other) as second, pytest.raises(ProbeError, match=differ):
            probed(remote(models["big"], url, second))
        monkeypatch.setattr("opdengine.teachers.served_model.PROTOCOL", 1)
        with pytest.raises(ProbeError, match="speaks version 1 of the protocol, and this side 2"):
            probed(remote(models["big"], url))


@pytest.mark.parametrize("kind", REASONS)
def test_an_answer_that_nobody_should_believe(
    models: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", SECRET)
    begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with hostile_server(kind) as address:
        teacher = remote(models["big"], address, api_key_env="KEY", timeout=0.7, max_retries=0)
        with pytest.raises(ProbeError) as refused:
            probed(teacher)
    said = str(refused.value)
    assert "teacher 't'" in said and address in said and len(said) < 1200
    assert harmless(said) == said and SECRET not in said
    assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024  # KiB


def test_bytes_that_are_not_those_of_the_tensors() -> None:
    """The line says what was asked for, and more or fewer bytes follow."""

    async def ask(more: int) -> None:
        line = json.dumps({"tensors": [{"shape": [2, 3], "dtype": "float32"}]}).encode() + b"\n"
        body = line + bytes(24 + more)
        reader = asyncio.StreamReader()
        reader.feed_data(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        reader.feed_eof()
        line_, (found,) = await _answer(reader, lambda line: [torch.empty(2, 3)])
        assert not found.any() and line_["tensors"]

    asyncio.run(ask(0))
    for more in (-1, 1, 100):
        with pytest.raises(BadAnswer, match=rf"{24 + more} bytes of tensors, where 24 were asked for"):
            asyncio.run(ask(more))


def test_a_server_may_say_anything_of_itself(served: Served) -> None:
    line = {**served.about()[0], "fingerprint": "f"}
    assert About.of(line).rows == served.head.weight.shape[0]
    for other in mutations(line):
        if isinstance(other, dict):
            with contextlib.suppress(BadAnswer):
                About.of(other)


def test_completions_of_any_kind() -> None:
    line = {"lengths": [3, 2], "reasons": ["stop", "length"], "stop_ids": [1]}
    expect = _expect_written(2, 5)
    assert [t.numel() for t in expect(line)] == [5, 5]
    for other in mutations(line):
        if isinstance(other, dict):
            with contextlib.suppress(BadAnswer):
                assert sum(t.numel() for t in expect(other)) <= 20


def test_ids_beyond_the_head_are_no_completion(models: dict[str, str], served: Served) -> None:
    spoiled = Spoiled(served, plain)

    def write(*arguments: Any) -> Reply:
        line, (ids, logprobs) = served.write(*arguments)
        return line, [ids + 10**6, logprobs]

    spoiled.write = write  # type: ignore[attr-defined]
    with answering(spoiled) as url:
        teacher = probed(remote(models["big"], url, stop=False), judges=False)
        (found,) = asyncio.run(teacher.generate([Request("r", (40, 41))], SamplingParams(max_tokens=3)))
    assert isinstance(found, Failure) and found.reason == "wrong_ids"


def test_a_context_that_is_too_long_is_named(models: dict[str, str], served: Served) -> None:
    with answering(served) as url:
        teacher = probed(remote(models["big"], url))
        (short,) = contexts(1)
        long = type(short)("the long one", "t", short.token_ids.repeat(100), short.target_positions)
        with pytest.raises(
            TeacherError, match=r"http_422.*context 'the long one' has 2000 tokens, and the window .* 1024"
        ):
            asyncio.run(teacher.score([short, long]))
        with pytest.raises(TeacherError, match=r"http_422.*prompt 'r' has 1000 tokens and may be continued by 100"):
            asyncio.run(teacher.generate([Request("r", (40,) * 1000)], SamplingParams(max_tokens=100)))


@pytest.mark.parametrize(
    ("lengths", "most", "parts"),
    [
        ([], 5, []),
        ([9], 5, [range(1)]),
        ([2, 3, 1, 9, 1], 5, [range(2), range(2, 3), range(3, 4), range(4, 5)]),
        ([1, 1, 1], 0, [range(1), range(1, 2), range(2, 3)]),
    ],
)
def test_questions_are_cut_between_contexts(lengths: list[int], most: int, parts: list[range]) -> None:
    assert list(parts_of(lengths, most)) == parts


def test_a_question_that_is_refused_stops_no_endpoint(models: dict[str, str], served: Served) -> None:
    refusals = iter([RefusedError(422, "not this one")])

    def refuse_once(reply: Reply) -> Reply:
        if (error := next(refusals, None)) is not None:
            raise error
        return reply

    with answering(Spoiled(served, refuse_once)) as url:
        teacher = probed(remote(models["big"], url, stop=False))
        found = asyncio.run(teacher.score(contexts(12)))
    failed = [f for f in found if isinstance(f, Failure)]
    assert 0 < len(failed) < 12 and {f.reason for f in failed} == {"http_422"}
    assert all(e.lost is None for e in teacher.pool.endpoints)


def test_names_of_any_kind_are_carried(models: dict[str, str], served: Served) -> None:
    (one,) = contexts(1)
    names = ["", "x" * 500, "\ud800", "日本\n\x00"]
    with answering(served) as url:
        teacher = probed(remote(models["big"], url))
        asked = [type(one)(name, "t", one.token_ids, one.target_positions) for name in names]
        assert len(states(asyncio.run(teacher.score(asked)))) == len(names)
        requests = [Request(name, (40, 41), 1) for name in names]
        assert all(len(c.token_ids) for c in asyncio.run(teacher.generate(requests, SamplingParams(max_tokens=3))))


def test_nothing_is_asked_where_there_is_nothing(models: dict[str, str], served: Served) -> None:
    with answering(served) as url:
        teacher = probed(remote(models["big"], url))
        assert asyncio.run(teacher.score([])) == []
        assert asyncio.run(teacher.generate([], SamplingParams())) == []
