"""Names of models and data sets that cannot be found: one sentence of ours, whatever the hub's libraries raise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import errors

from opdengine.cli import main
from opdengine.data.prompts import DataError, load_prompts
from opdengine.models.backbone import load_model
from opdengine.models.chat import load_tokenizer
from opdengine.models.files import read_config
from opdengine.models.hub import hub_problem

http: Any = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
"""The client that huggingface_hub uses: httpx, or its successor."""

AWAY = "is not whole in the cache of the Hugging Face hub, and the hub cannot be asked (HF_HUB_OFFLINE=1 is set)"


@pytest.mark.parametrize("read", [read_config, load_model, load_tokenizer])
def test_a_model_that_is_nowhere(read: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="nothing-here") as refused:
        read("nobody/nothing-here")
    told = str(refused.value)
    assert told.startswith("the model 'nobody/nothing-here' is no folder here, ") and AWAY in told
    assert told.endswith("fetch it where there is a network with 'hf download nobody/nothing-here'")
    assert "\n" not in told
    with pytest.raises(ValueError, match=r"'no body' is no folder here, and no name that .* could have .OWNER/NAME."):
        read("no body")


@pytest.mark.parametrize("name", ["nobody/nothing-here", "nothing"])
def test_a_data_set_that_is_nowhere(name: str) -> None:
    with pytest.raises(DataError) as refused:
        load_prompts([f"{name}:train"])
    told = str(refused.value)
    assert told.startswith(f"data file '{name}:train' is no file or folder here, ") and AWAY in told
    assert told.endswith(f"with 'hf download --repo-type dataset {name}'")


def test_the_command_line_says_so_in_one_line(prompt_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "nobody/nothing-here", "--eval_data", prompt_file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opdengine: the model 'nobody/nothing-here' is no folder here")


def answer(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = http.Request("GET", "https://huggingface.co/x/y")
    return kind("it says no", response=http.Response(status, request=request))


def led_to(error: BaseException) -> BaseException:
    """What transformers raises: an error of its own, with the hub's as its cause."""
    try:
        raise OSError("something long") from error
    except OSError as outer:
        return outer


def test_what_the_hub_answers_decides_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none of this name that you may read" in str(
        hub_problem("x/y", led_to(answer(errors.RepositoryNotFoundError, 404)))
    )
    gated = hub_problem("x/y", led_to(answer(errors.GatedRepoError, 403)), data=True)
    assert "accept its terms at https://huggingface.co/datasets/x/y and log in" in str(gated)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for error in (http.ConnectError("no route"), http.ReadTimeout("slow"), errors.LocalEntryNotFoundError("none")):
        assert "(no connection)" in str(hub_problem("x/y", led_to(error)))
    assert hub_problem("x/y", led_to(ValueError("another failure"))) is None
