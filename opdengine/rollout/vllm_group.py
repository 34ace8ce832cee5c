"""One vLLM engine over the GPUs of several ranks of a machine (``vllm_tensor_parallel_size``).

The first rank of every group starts a server as its child, and all of the group sample from it as from any
other (:mod:`opdengine.rollout.vllm_client`). Between them is a socket in a folder that only their user can open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import weakref
from collections.abc import Sequence
from typing import Any

from opdengine.distributed import Ranks
from opdengine.rollout.engine_process import CLOSE_SECONDS, EngineError, end_of_log
from opdengine.rollout.http_client import HTTPError, JSONClient, SilentError, UnreachableError
from opdengine.rollout.vllm import require_vllm
from opdengine.rollout.vllm_base import private_folders, remove_folders
from opdengine.rollout.vllm_client import RESUME, VLLMServerSampler
from opdengine.rollout.vllm_server import server_command

POLL_SECONDS = 0.3


class VLLMGroupSampler(VLLMServerSampler):
    """A :class:`~opdengine.rollout.Sampler` on a vLLM engine that ranks of one machine share.

    All ranks create it and all call :meth:`load_policy`. An engine that dies is not replaced: the run ends
    and is resumed.

    Args:
        model: model folder or hub name.
        tokenizer: decodes what was sampled.
        ranks: of the run.
        size: consecutive ranks of a machine that share an engine, and its number of GPUs.
        devices: CUDA_VISIBLE_DEVICES of this rank's engine; None: the trainer's.
        dtype, max_model_len, gpu_memory_utilization, max_num_seqs, seed, trust_remote_code, stop_ids: see
            :class:`~opdengine.rollout.vllm.VLLMSampler`.
        start_timeout: seconds to load the model.
        response_timeout: seconds for one sample or one weight update.

    Raises:
        VLLMMissingError: vLLM is not installed.
        EngineError: the engine did not start; the message holds the end of its log.
        PeerError: that of another group did not.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        *,
        ranks: Ranks,
        size: int,
        devices: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        max_num_seqs: int = 256,
        seed: int = 0,
        trust_remote_code: bool = False,
        start_timeout: float = 900.0,
        response_timeout: float = 3600.0,
        stop_ids: Sequence[int] = (),
    ) -> None:
        owner = ranks.rank - ranks.local_rank % size
        settings = ["--tensor-parallel-size", size, "--max-num-seqs", max_num_seqs, "--seed", seed]
        settings += ["--gpu-memory-utilization", gpu_memory_utilization]
        settings += ["--trust-remote-code"] if trust_remote_code else []
        self._server: OwnServer | None = None
        with ranks.agree():
            require_vllm("set use_vllm to false to sample without it")
            if ranks.rank == owner:
                self._server = OwnServer(model, dtype, max_model_len, list(map(str, settings)), devices, start_timeout)
        places = ranks.gather((self._server.url, self._server.log) if self._server else ("", ""))
        url, self._log = places[owner]
        super().__init__(
            url,
            tokenizer,
            dtype=dtype,
            response_timeout=response_timeout,
            ranks=ranks,
            owner=owner,
            stop_ids=stop_ids,
        )

    def close(self) -> None:
        """End a call in flight, delete the weight files and, on the first rank of the group, stop the engine."""
        super().close()
        if self._server is not None:
            self._server.stop()

    def _advice(self) -> str:
        return f". It belongs to this run, which starts it again: {RESUME}{end_of_log(self._log)}"


class OwnServer:
    """``opdengine vllm-serve`` as a child of this process, which ends with it.

    Args:
        model, dtype, max_model_len, devices: see :func:`opdengine.rollout.vllm_server.server_command`.
        extra: further arguments of ``vllm serve``.
        timeout: seconds until it must answer.

    Attributes:
        url: its address, for :class:`~opdengine.rollout.http_client.JSONClient`.
        log: file of all that it prints.

    Raises:
        EngineError: it ended or did not answer in time; the message holds the end of its log.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        max_model_len: int | None,
        extra: Sequence[str],
        devices: str | None,
        timeout: float,
    ) -> None:
        folders = private_folders()
        socket_file, self.log = f"{folders[0]}/socket", f"{folders[-1]}/server.log"
        self.url = f"unix:{socket_file}"
        command, environment = server_command(
            *(model, "127.0.0.1", 0, dtype, max_model_len),
            extra=[*extra, "--uds", socket_file],
            devices=devices,
            parent=os.getpid(),
        )
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._finalizer = weakref.finalize(self, _stop, os.getpid(), self.process, folders)
        try:
            self._wait(timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server with its workers; safe to call again."""
        self._finalizer()

    def _wait(self, timeout: float) -> None:
        client, deadline = JSONClient(self.url), time.monotonic() + timeout
        while True:
            try:
                client.call("/health", timeout=timeout)
                return
            except (HTTPError, SilentError, UnreachableError) as error:
                if (code := self.process.poll()) is not None:
                    what = f"ended with exit code {code} before it was ready"
                elif time.monotonic() > deadline:
                    what = f"was not ready after {timeout:.0f} s ({error})"
                else:
                    time.sleep(POLL_SECONDS)
                    continue
                raise EngineError(f"the vLLM engine {what}{end_of_log(self.log)}") from None


def _stop(owner: int, process: subprocess.Popen[bytes], folders: Sequence[str]) -> None:
    """Let the server and all that it has started leave by themselves, and end them if they do not."""
    if os.getpid() != owner:
        return
    process.terminate()
    deadline = time.monotonic() + CLOSE_SECONDS
    with contextlib.suppress(ProcessLookupError):  # none is left
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    remove_folders(folders)
