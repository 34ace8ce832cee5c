"""The page of ``opdengine report`` as bytes: bounded, self-contained, and nothing in it but data is foreign."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import EVIL, rollout, write_agent_run, write_run

from opdengine.cli import main
from opdengine.errors import ConfigError, WriteError
from opdengine.metrics import write_jsonl
from opdengine.tools.report import render, write_report
from opdengine.tools.report.runs import curves, distinct, flat, thin
from opdengine.tools.report.serve import server_of


class Elements(HTMLParser):
    """Names of all elements, and the text of the one that holds the data."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.data = ""
        self._inside = False
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        self._inside = ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.data += data if self._inside else ""


def data_of(page: bytes) -> dict[str, Any]:
    return json.loads(Elements(page).data)


def test_foreign_text_is_data_and_nothing_else(tmp_path: Path) -> None:
    plain, evil = (render([write_run(tmp_path / str(i), evil=bool(i))]) for i in range(2))
    assert Elements(evil).names == Elements(plain).names
    data = data_of(evil)
    row = data["runs"][0]["rollouts"]["rows"][0]
    assert row["text"] == EVIL and data["texts"][row["prompt"]] == [[EVIL, EVIL]]
    assert EVIL in row["tok"]["p"]
    assert data["runs"][0]["curves"]["grad_norm"][1][0] is None  # NaN is no JSON


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    found = Elements(render([write_run(tmp_path / "a")]))
    assert not [value for name, value in found.attributes if name == "src"]
    assert [value for name, value in found.attributes if name == "href"] == ["data:,"]
    (policy,) = [value for name, value in found.attributes if name == "content" and "default-src" in str(value)]
    assert "default-src 'none'" in str(policy) and "connect-src 'none'" in str(policy)


def test_a_page_of_a_large_run_is_small_and_spans_all_of_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "long", steps=300, rollouts=2, tokens=4)
    for step in (1, 150, 300):
        write_jsonl(folder / f"rollouts/step_{step}.jsonl", [rollout(step, i, text="x" * 50_000) for i in range(200)])
    page = render([folder], size=400_000)
    assert len(page) < 600_000
    run = data_of(page)["runs"][0]
    shown = {row["step"] for row in run["rollouts"]["rows"]}
    assert {1, 300} <= shown and len(shown) == run["rollouts"]["steps"] <= 24 < run["rollouts"]["all_steps"]
    assert run["totals"]["sampled"] == 600 and run["totals"]["dropped"] == {"balance": 150}
    assert "more characters in the files of the run]" in max((row["text"] for row in run["rollouts"]["rows"]), key=len)
    assert len(render([folder])) < 10_000_000


def test_an_older_run_and_a_damaged_one_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    """Rollouts of before prompts were logged; lines and files that were cut off."""
    old = write_run(tmp_path / "old", steps=2)
    write_jsonl(old / "rollouts/step_1.jsonl", [{"id": "0.0", "prompt_id": "p", "text": "t", "reward": None}])
    (old / "config.yaml").unlink()
    with (old / "rollouts/step_1.jsonl").open("a") as file:
        file.write('{"id": "1.0", "te\n[1]\n')
    (old / "tokens/step_2.npz").write_bytes(b"PK")
    (old / "metrics.jsonl").open("a").write('{"step": 3, "lo')
    run = data_of(render([old]))["runs"][0]
    first = [row for row in run["rollouts"]["rows"] if row["step"] == 1]
    assert len(first) == 1 and first[0]["text"] == "t" and "answer" not in first[0]
    assert "step_2.npz holds no tokens" in run["rollouts"]["unread"][0]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert data_of(render([tmp_path / "bare"]))["runs"][0]["rollouts"]["rows"] == []


def test_verdicts_stand_at_their_turns(tmp_path: Path) -> None:
    rows = data_of(render([write_agent_run(tmp_path / "a")]))["runs"][0]["rollouts"]["rows"]
    first = next(row for row in rows if row["step"] == 1)
    assert [turn.get("verdict", {}).get("label") for turn in first["turns"]] == ["skip", None, "strong"]
    assert first["turns"][1]["chat"] == [["user", "You are in the kitchen."]]
    assert first["turns"][2]["failure"] == "unparseable"


def test_runs_have_names_that_tell_them_apart_and_their_settings(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "x/run", steps=1), write_run(tmp_path / "y/run", steps=1, evil=True)
    data = data_of(render([one, other]))
    assert [run["name"] for run in data["runs"]] == ["x/run", "y/run"]
    assert [run["settings"]["learning_rate"] for run in data["runs"]] == ["0.0001", "0.001"]
    assert data["runs"][0]["settings"]["teachers.0.model"] == "m"
    assert distinct([one, one]) == distinct([one, one]) and len(set(distinct([one, one]))) == 2
    assert flat({"a": {"b": [1, 2], "c": {}}, "d": None}) == {"a.b": "[1, 2]", "a.c": "{}", "d": ""}


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [(i, 100.0 if i == 4321 else -50.0 if i == 77 else float("nan") if i == 5 else 0.0) for i in range(10_000)]
    thinned = thin(points, 100)
    assert len(thinned) <= 100 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert (4321, 100.0) in thinned and (77, -50.0) in thinned
    assert curves([{"step": 1, "a": 1, "b": True, "c": "x"}]) == {"a": [[1], [1.0]]}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(write_run(tmp_path / "a", steps=2)), tmp_path / "page.html"
    assert main(["report", run, run, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"written: {out} (0.")
    assert len(data_of(out.read_bytes())["runs"]) == 2
    for arguments, message in (
        ([str(tmp_path)], "holds no run (metrics.jsonl is missing); name the output_dir of a run"),
        ([run, "--out", str(tmp_path / "no" / "page.html")], "cannot be written (No such file or directory)"),
        ([run, "--port", "80"], "--port belongs to --watch"),
        ([run, "--watch", "--out", str(out)], "writes no file"),
        ([run, "--watch", "--port", "99999"], "--port 99999 is not possible"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(WriteError, match="name another file"):
        write_report([Path(run)], tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"pip install 'opdengine\[train\]'"):
        render([write_run(tmp_path / "a", steps=1)])


def test_a_watched_page_is_made_anew_when_the_run_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=1)
    with server_of([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"

        def get(path: str, **headers: str) -> bytes:
            with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=20) as answer:
                return answer.read()

        before = get("/stamp")
        assert get("/stamp") == before
        assert data_of(get("/"))["watch"] is True
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "loss": 0.125}\n')
        assert get("/stamp") != before
        assert data_of(get("/"))["runs"][0]["steps"] == 2
        for path, host in (("/", "evil.example"), ("/etc/passwd", "localhost")):
            with pytest.raises(urllib.error.HTTPError):
                get(path, Host=host)
        server.shutdown()
        thread.join()
