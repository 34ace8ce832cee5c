"""An exact teacher on a server beside one that tells its likeliest tokens: bytes, seconds, and what is lost.

    python benchmarks/teacher_serve.py --model models/smollm2 [--save] [--prompts 12] [--tokens 24] [--rounds 3]
                                       [--vllm PYTHON]

The student samples after the prompts of ``real_rows.py``; the teacher is the same model with noise in every matrix,
and reads a system message that the student does not see. It judges the samples in this process, behind ``opdengine
teacher-serve`` (float32 and bfloat16 states) and behind an OpenAI-compatible server that tells k log-probs of every
token of the prompt. That server is vLLM, started by ``--vllm PYTHON`` (an interpreter that has it), and else the
stand-in of the tests (``tests/teachers/teacher_server.py``: a forward pass of transformers and JSON, whose seconds say
little). All of them compute in float32, each with one thread.

Bytes are those of TCP in both directions, counted by a relay. Seconds are wall time of a call with all contexts, and
processor time of server and trainer together; of every way the fastest of the rounds, which take turns. Errors are of
the mean divergence and of its gradient with respect to the student's hidden states, against the teacher in this
process. ``--save`` writes ``benchmarks/results/real/teacher_serve.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from conftest import real_model_parser, save_results
from real_rows import NOISE, PROMPTS
from real_teachers import PRIVILEGED

from opd_kernels import LMHead, TeacherHead, linear_divergence, topk_divergence
from opdengine.config.sections import TeacherConfig
from opdengine.models.chat import encode_chat, load_tokenizer, vocabulary_size
from opdengine.teachers.local import LocalTeacher
from opdengine.teachers.remote import RemoteTeacher
from opdengine.teachers.server import ServedTeacher
from opdengine.types import Hidden, TeacherContext, TopK

KINDS = ("reverse_kl", "forward_kl")
KS = (8, 64)
STAND_IN = ROOT / "tests" / "teachers" / "teacher_server.py"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Relay:
    """Passes connections on to a server and counts their bytes."""

    url: str
    target: int
    sent: int = 0
    received: int = 0

    def pump(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        """One direction of a connection, to its end."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def connect(self, client: socket.socket) -> None:
        """A connection of a client."""
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            back = threading.Thread(target=self.pump, args=(server, client, "received"))
            back.start()
            self.pump(client, server, "sent")
            back.join()


@contextlib.contextmanager
def relay(port: int) -> Iterator[Relay]:
    """A relay to a port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Relay(f"http://127.0.0.1:{listener.getsockname()[1]}", port)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=found.connect, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A server, ended at the end."""
    places = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    where = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": places, **variables}
    with log.open("w") as errors:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=where)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(60)


def processor_seconds(pid: int) -> float:
    """Of a process and all that descend from it."""
    fields: dict[int, list[str]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
            fields[int(name)] = stat.read().rpartition(")")[2].split()
    family = {pid}
    while more := {p for p, f in fields.items() if int(f[1]) in family} - family:
        family |= more
    return sum(int(fields[p][11]) + int(fields[p][12]) for p in family if p in fields) / TICKS


@torch.no_grad()
def prepare(folder: str, teacher: Path, prompts: int, tokens: int) -> tuple[list[TeacherContext], torch.Tensor, LMHead]:
    """Sample, and save the teacher; contexts, the student's states of their targets, and its head."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    contexts, states = [], []
    for number, prompt in enumerate(PROMPTS[:prompts]):
        asked = {"role": "user", "content": prompt}
        start = torch.tensor([encode_chat(tokenizer, [asked])])
        out = model.generate(start, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
        states.append(model.model(out).last_hidden_state[0, start.shape[1] - 1 : -1])
        told = encode_chat(tokenizer, [{"role": "system", "content": PRIVILEGED}, asked])
        ids = np.array([*told, *out[0, start.shape[1] :].tolist()])
        contexts.append(TeacherContext(f"s{number}", "t", ids, np.arange(len(told), len(ids))))
    head = LMHead(model.lm_head.weight.detach().clone())
    for matrix in model.model.layers.parameters():
        if matrix.dim() == 2:
            matrix.add_(torch.randn_like(matrix), alpha=NOISE * float(matrix.std()))
    model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    return contexts, torch.cat(states), head


Judged = dict[str, tuple[float, torch.Tensor]]


def learned(found: Sequence[Any], teacher: Any, student: torch.Tensor, head: LMHead) -> Judged:
    """Mean divergence and its gradient with respect to the student's states, by kind."""
    results: Judged = {}
    vocabulary = vocabulary_size(teacher.tokenizer)
    for kind in KINDS:
        hidden = student.clone().requires_grad_()
        shared: dict[str, Any] = {"divergence": kind, "reduction": "mean", "vocab_size": vocabulary}
        if all(isinstance(f, Hidden) for f in found):
            states = torch.cat([f.states for f in found]).to(teacher.head.weight.dtype)
            loss = linear_divergence(hidden, head, [TeacherHead.of(states, teacher.head)], **shared).loss
        else:
            assert all(isinstance(f, TopK) for f in found), found
            ids, logprobs = (
                torch.from_numpy(np.concatenate([getattr(f, n) for f in found])) for n in ("ids", "logprobs")
            )
            loss = topk_divergence(hidden, head.weight, ids, logprobs, **shared).loss
        results[kind] = loss.item(), torch.autograd.grad(loss, hidden)[0]
    return results


def errors(judged: Judged, exact: Judged) -> dict[str, dict[str, float]]:
    """Relative errors of value and gradient."""
    return {
        kind: {
            "value": abs(judged[kind][0] - value) / value,
            "gradient": float((judged[kind][1] - gradient).norm() / gradient.norm()),
        }
        for kind, (value, gradient) in exact.items()
    }


def measure(ways: dict[str, tuple[Any, Relay | None, int]], contexts: list[TeacherContext], rounds: int) -> Any:
    """(what each way answered, {way: bytes and seconds}); a first round is not counted."""
    found: dict[str, Any] = {}
    figures: dict[str, Any] = {name: {"seconds": [], "processor_seconds": []} for name in ways}
    for number in range(rounds + 1):
        for name, (teacher, through, pid) in ways.items():
            before = (through.sent, through.received) if through is not None else (0, 0)
            own, served, begin = time.process_time(), processor_seconds(pid) if pid else 0.0, time.perf_counter()
            found[name] = asyncio.run(teacher.score(contexts))
            seconds = time.perf_counter() - begin
            time.sleep(0.2)  # the clock of a process has ticks, and a relay's last bytes are on their way
            spent = time.process_time() - own + (processor_seconds(pid) - served if pid else 0.0)
            if through is not None:
                figures[name] |= {"sent": through.sent - before[0], "received": through.received - before[1]}
            if number:
                figures[name]["seconds"].append(seconds)
                figures[name]["processor_seconds"].append(spent)
    for figure in figures.values():
        figure |= {key: min(figure[key]) for key in ("seconds", "processor_seconds")}
    return found, figures


@contextlib.contextmanager
def listing(teacher: Path, vllm: str | None, root: Path) -> Iterator[tuple[int, int, str, str]]:
    """A server of log-probs: its port, process, served name, and what it is."""
    if vllm is None:
        with process([sys.executable, str(STAND_IN), str(teacher)], root / "stand_in.log") as server:
            assert server.stdout is not None
            yield int(server.stdout.readline()), server.pid, "tiny", "the tests' stand-in"
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(teacher), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--max-logprobs",
        str(max(KS)), "--enforce-eager", "--kv-cache-memory-bytes", str(512 << 20),
    ]  # fmt: skip
    quiet = {"VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": ""}
    with process(command, root / "vllm.log", **quiet) as server:
        threading.Thread(target=server.stdout.read, daemon=True).start()  # type: ignore[union-attr]
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((root / "vllm.log").read_text()[-3000:]) from None
                time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=5) as answer:
            version = json.load(answer)["version"]
        yield port, server.pid, "tiny", f"vLLM {version}"


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All ways on the same contexts."""
    folder = root / "teacher"
    contexts, student, head = prepare(options.model, folder, options.prompts, options.tokens)
    name, tokenizer = str(folder), load_tokenizer(str(folder))
    here = LocalTeacher(TeacherConfig(name, name="t"))
    serve = [sys.executable, "-m", "opdengine", "teacher-serve", "--model", name, "--port", "0"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(process(serve, root / "serve.log"))
        assert server.stdout is not None
        exact = stack.enter_context(relay(int(server.stdout.readline().split()[0].rpartition(":")[2])))
        port, pid, served, what = stack.enter_context(listing(folder, options.vllm, root))
        lists = stack.enter_context(relay(port))
        ways: dict[str, tuple[Any, Relay | None, int]] = {"here": (here, None, 0)}
        for dtype in ("float32", "bfloat16"):
            far = RemoteTeacher(
                TeacherConfig(name, name="t", hidden_states_url=[exact.url], hidden_states_dtype=dtype), tokenizer
            )
            asyncio.run(far.probe(judges=True))
            ways[f"states {dtype}"] = far, exact, server.pid
        head_bytes = exact.received // 2
        for k in KS:
            config = TeacherConfig(served, name="t", base_url=f"{lists.url}/v1", tokenizer=name, score_top_k=k)
            listed = ServedTeacher(config, tokenizer, vocabulary_size(tokenizer))
            asyncio.run(listed.probe(judges=True))
            ways[f"top {k}"] = listed, lists, pid
        found, figures = measure(ways, contexts, options.rounds)
    reference = learned(found["here"], here, student, head)
    results = {
        way: figures[way] | {"errors": errors(learned(found[way], teacher, student, head), reference)}
        for way, (teacher, *_) in ways.items()
    }
    return {
        "prompts": options.prompts,
        "targets": sum(len(c.target_positions) for c in contexts),
        "tokens": sum(len(c.token_ids) for c in contexts),
        "lists": what,
        "head_bytes": head_bytes,
        "divergence": {kind: value for kind, (value, _) in reference.items()},
        "ways": results,
    }


def main(arguments: list[str]) -> int:
    parser = real_model_parser(__doc__, prompts=12, tokens=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM, which then tells the log-probs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        results = run(options, Path(root))
    print(json.dumps(results, indent=1))
    if options.save:
        save_results(ROOT / "benchmarks" / "results" / "real" / "teacher_serve.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
