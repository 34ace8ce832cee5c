"""The report in a real browser (Debian's chromium, without a window): ``make test-browser``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import write_agent_run, write_run

from opdengine.metrics import write_jsonl
from opdengine.tools.report import write_report
from tiny import demo, task

pytestmark = pytest.mark.browser
TABS = ("overview", "curves", "rollouts", "debates", "evaluations", "dropped", "settings")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'opdengine[browser]'")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    runs = [write_run(root / "plain"), write_run(root / "evil", evil=True), write_agent_run(root / "agent")]
    write_report(runs, root / "report.html")
    return root / "report.html"


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    """The page of runs written by hand, wide and light or narrow and dark."""
    yield from opened(browser, report, *request.param)


def opened(browser: Any, report: Path, width: int, scheme: str) -> Iterator[Any]:
    """An open page; at the end it has said nothing in the console, and nothing foreign has run."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    page.goto(f"file://{report}")
    yield page
    assert said == []
    assert page.evaluate("window.harmed") is None
    context.close()


def test_every_part_opens_and_fits_the_width(page: Any) -> None:
    for tab in TABS:
        page.locator(f"nav a[href='#{tab}']").click()
        page.wait_for_selector(f"nav a[href='#{tab}'][aria-current]")
        assert page.locator("main > *").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], tab
    assert page.evaluate("document.documentElement.dataset.theme") == (
        "light" if page.viewport_size["width"] == 1280 else "dark"
    )


def test_curves_are_drawn_compared_and_filtered(page: Any) -> None:
    page.goto(page.url.split("#")[0] + "#curves")
    page.wait_for_selector("canvas")
    page.get_by_role("searchbox").fill("loss")
    assert page.locator("h3").all_inner_texts() == ["loss"]
    page.wait_for_selector(".u-legend")
    assert page.locator(".u-legend .u-series").count() == 4  # steps and three runs
    page.locator(".chip").nth(1).click()
    page.wait_for_selector(".u-legend")
    assert page.locator(".u-legend .u-series").count() == 3
    low, high = page.evaluate("around(null, 0, 0)")  # of a metric that is always 0
    assert -0.2 <= low < 0 < high <= 0.2


def test_rollouts_are_filtered_and_their_tokens_tell_numbers(page: Any) -> None:
    page.goto(page.url.split("#")[0] + "#rollouts")
    everything = page.locator(".list button").count()
    page.locator("select[name=show]").select_option("drop:balance")
    dropped = page.locator(".list button").count()
    assert 0 < dropped < everything
    assert "left out before the teachers judged" in page.locator(".detail").inner_text()
    page.locator("select[name=show]").select_option("tokens")
    page.locator("select[name=run]").select_option("0")
    detail = page.locator(".detail").first.inner_text()
    assert "question" in detail and "expected" in detail
    page.locator("select[name=colour]").select_option("advantage")
    page.locator(".tokens span").nth(3).hover()
    facts = page.locator(".facts").inner_text()
    assert "advantage" in facts and "small: share 0.75" in facts and '" word1" 50 %' in facts
    tints = {span.get_attribute("style") for span in page.locator(".tokens span").all()[:20]}
    assert len(tints) > 3
    page.get_by_role("searchbox").fill("no such text")
    assert "No rollout fits" in page.locator("main").inner_text()


def test_turns_have_their_verdicts_in_the_margin(page: Any) -> None:
    page.goto(page.url.split("#")[0] + "#rollouts")
    page.locator("select[name=run]").select_option("2")
    turns = page.locator(".turn")
    assert "go kitchen" in turns.nth(0).inner_text() and "skip" in turns.nth(0).locator("aside").inner_text()
    assert "You are in the kitchen." in turns.nth(1).inner_text()
    assert "unparseable" in turns.nth(2).locator("aside").inner_text()


def test_debates_drops_and_settings(page: Any) -> None:
    page.goto(page.url.split("#")[0] + "#debates")
    assert "round 2" in page.locator(".detail").inner_text() and "0.6" in page.locator(".detail").inner_text()
    page.goto(page.url.split("#")[0] + "#dropped")
    assert (
        "balance" in page.locator("table:not(.u-legend)").inner_text()
        and "(25 %)" in page.locator("table:not(.u-legend)").inner_text()
    )
    page.goto(page.url.split("#")[0] + "#settings")
    table = page.locator("table:not(.u-legend)").inner_text()
    assert "learning_rate" in table and "teachers.0.model" not in table
    page.get_by_label("only what differs").uncheck()
    assert "teachers.0.model" in page.locator("table:not(.u-legend)").inner_text()


def train(folder: Path, settings: dict[str, Any]) -> None:
    """A run as a user starts it."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    command = [sys.executable, "-m", "opdengine", "train", "--config", str(file)]
    subprocess.run(command, check=True, timeout=1200, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.fixture(scope="module")
def demo_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo's models: a few steps of MAD-OPD and of MT-OPD."""
    root = tmp_path_factory.mktemp("demo")
    write_jsonl(root / "data.jsonl", [row for skill in task.SKILLS for row in task.prompts("train", skill, 6)])
    shared = {
        "model": demo.STUDENT, "teachers": [{"model": demo.CONVERT}, {"model": demo.COMPILE}], "dtype": "float32",
        "train_data": [str(root / "data.jsonl")], "eval_data": [str(root / "data.jsonl")], "eval_max_prompts": 4,
        "verifier": f"{demo.HERE / 'task.py'}:verify", "max_completion_length": 14, "max_steps": 3,
        "per_device_train_batch_size": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0,
    }  # fmt: skip
    arms = {"mad_opd": {"debate": demo._debate(rounds=2)}, "mt_opd": {"divergence": "jsd"}}
    for method, own in arms.items():
        train(root / method, {**shared, **own, "method": method})
    write_report([root / method for method in arms], root / "report.html")
    return root / "report.html"


def test_a_run_of_the_demo_is_shown_whole(browser: Any, demo_report: Path) -> None:
    for page in opened(browser, demo_report, 1280, "light"):
        page.wait_for_selector("canvas")
        assert page.locator("main .card h2").all_inner_texts()[:2] == [" mad_opd", " mt_opd"]
        page.locator("nav a[href='#rollouts']").click()
        assert page.locator(".list button").count() == 24
        assert "Debate of its teachers" in page.locator(".detail").inner_text()
        offered = page.locator("select[name=colour] option").all_inner_texts()
        assert any("gap" in name for name in offered) and any("KL" in name for name in offered)
        page.locator(".tokens span").first.click()
        assert "teacher_convert: KL" in page.locator(".facts").inner_text()
        page.locator("nav a[href='#evaluations']").click()
        assert "expected answer" in page.locator(".detail").inner_text().lower()
        page.locator("nav a[href='#settings']").click()
        assert "divergence" in page.locator("main").inner_text() and "jsd" in page.locator("main").inner_text()


@pytest.fixture(scope="module")
def real_report(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> Path:
    """A step of MAD-OPD with SmolLM2, which writes code, long words and several alphabets."""
    root = tmp_path_factory.mktemp("real")
    prompts = {
        "alphabets": "Say hello in Japanese, Arabic and Russian, e.g. こんにちは, مرحبا, Привет, and end with 🎉.",
        "code": "Write a Python function fib(n) with a docstring, in a fenced block, and explain it at length.",
    }
    write_jsonl(root / "data.jsonl", [{"id": i, "prompt": prompt, "answer": "none"} for i, prompt in prompts.items()])
    teachers = [{"model": smollm2, "name": name, "dtype": "float32"} for name in ("first", "second")]
    settings = {
        "model": smollm2, "teachers": teachers, "dtype": "float32", "method": "mad_opd", "max_steps": 1,
        "train_data": [str(root / "data.jsonl")], "eval_data": [str(root / "data.jsonl")], "verifier": "numeric",
        "debate": {"rounds": 2, "max_tokens": 16}, "max_completion_length": 64, "per_device_train_batch_size": 2,
        "temperature": 0.3, "repetition_penalty": 1.0,
    }  # fmt: skip
    train(root / "real", settings)
    write_report([root / "real"], root / "report.html")
    return root / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")], ids=["wide", "narrow"])
def test_a_run_of_a_real_model_can_be_read(browser: Any, real_report: Path, width: int, scheme: str) -> None:
    for page in opened(browser, real_report, width, scheme):
        for tab in TABS:
            page.locator(f"nav a[href='#{tab}']").click()
            page.wait_for_selector(f"nav a[href='#{tab}'][aria-current]")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        value = page.locator(".settings tr", has_text="teachers.0.name").locator("td").nth(1)
        assert value.inner_text() == "first" and value.bounding_box()["x"] + 40 < width
        page.locator("nav a[href='#rollouts']").click()
        assert page.locator(".list button").count() == 2
        for name in ("alphabets", "code"):
            page.locator(".list button", has_text=name).first.click()
            spans = page.locator(".tokens span")
            texts = spans.all_inner_texts()
            assert len(texts) > 20 and "\ufffd" not in "".join(texts)
            parts = [i for i, text in enumerate(texts) if re.search("<[0-9A-F]{2}", text)]
            assert bool(parts) == (name == "alphabets")
            words = [i for i, text in enumerate(texts) if text.strip().isalpha()]
            for i in (parts[0] if parts else words[0], words[-1]):
                spans.nth(i).hover()
                shown = page.locator(".facts").inner_text()
                assert "student log p" in shown and "first: KL" in shown and "second: share" in shown
                assert f'token "{texts[i]}"' in shown
                inside = page.locator(".facts").bounding_box()
                top, bottom = inside["y"], inside["y"] + inside["height"]
                assert top >= 0 and bottom <= 900  # in view beside the token that is pointed at
        assert "Debate of its teachers" in page.locator(".detail").inner_text()
        page.locator("nav a[href='#evaluations']").click()
        assert "こんにちは" in page.locator(".detail").inner_text()
