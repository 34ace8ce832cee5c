"""A small OpenAI-compatible server with scripted faults, as a process of its own.

``python teacher_server.py MODEL_FOLDER`` answers with a real tiny model; ``python teacher_server.py V``
with a table of bigrams over V ids, which starts at once. It prints its port. ``POST /control`` sets
the faults and what it writes; ``GET /control`` tells what it was asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

DEFAULTS: dict[str, Any] = {
    "faults": [],  # [{"kind", "on": "score" | "generate" | "", "times": n, "after": calls before it}]
    "say": None,  # text of every reply; {seed} is the request's
    "window": 512,
    "max_logprobs": 10_000,
    "names": ["tiny"],
    "tokenize": True,
    "pause": 0.0,
    "prompt_logprobs": "known",  # or "ignored", "refused"
    "echo": "",  # how completions with "echo" name tokens: "text", "token", "id"; "" does not know them
}


class State:
    """What the handlers share."""

    def __init__(self, model: str) -> None:
        self.lock = threading.Lock()
        self.settings = dict(DEFAULTS)
        self.seen: dict[str, Any] = {"score": 0, "generate": 0, "most_at_once": 0, "authorization": [], "bodies": []}
        self.at_once = 0
        self.tokenizer: Any = None
        if model.isdigit():
            self.table = np.random.default_rng(7).normal(0, 2, (int(model), int(model)))
            self.model = None
        else:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            torch.set_num_threads(1)
            self.model = AutoModelForCausalLM.from_pretrained(model).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(model)

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """float64 [L, V]: row i is the distribution of the token after position i."""
        if self.model is None:
            logits = self.table[np.array(ids)]
        else:
            import torch

            with torch.no_grad():
                logits = self.model(torch.tensor([ids])).logits[0].double().numpy()
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def fault(self, kind_of_call: str) -> dict[str, Any] | None:
        with self.lock:
            self.seen[kind_of_call] += 1
            for fault in self.settings["faults"]:
                if fault.get("on") not in ("", None, kind_of_call) or fault.get("times", 10**9) <= 0:
                    continue
                if fault.get("after", 0) > 0:
                    fault["after"] -= 1
                    continue
                fault["times"] = fault.get("times", 10**9) - 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    state: State
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def do_GET(self) -> None:
        settings = self.state.settings
        if self.path == "/control":
            self.answer(self.state.seen)
        elif self.path == "/v1/models":
            window = {} if settings["window"] is None else {"max_model_len": settings["window"]}
            self.answer({"data": [{"id": name, **window} for name in settings["names"]]})
        else:
            self.answer({"error": "no such path"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        if self.path == "/control":
            state.settings = {**DEFAULTS, **body}
            state.seen.update(score=0, generate=0, most_at_once=0, authorization=[], bodies=[])
            self.answer({})
        elif self.path == "/tokenize" and state.settings["tokenize"] and state.tokenizer is not None:
            self.answer({"tokens": state.tokenizer.encode(body["prompt"], add_special_tokens=False)})
        elif self.path == "/tokenize" and isinstance(state.settings["tokenize"], list):
            self.answer({"tokens": state.settings["tokenize"]})
        elif self.path == "/v1/completions":
            with state.lock:
                state.at_once += 1
                state.seen["most_at_once"] = max(state.seen["most_at_once"], state.at_once)
                state.seen["authorization"].append(self.headers.get("Authorization"))
                state.seen["bodies"].append({k: v for k, v in body.items() if k != "prompt"})
            try:
                time.sleep(state.settings["pause"])
                self.complete(body)
            finally:
                with state.lock:
                    state.at_once -= 1
        else:
            self.answer({"error": "no such path"}, 404)

    def complete(self, body: dict[str, Any]) -> None:
        state, k = self.state, body.get("prompt_logprobs")
        if k is not None and state.settings["prompt_logprobs"] == "refused":
            return self.answer({"error": {"message": "unknown field prompt_logprobs"}}, 400)
        if state.settings["prompt_logprobs"] == "ignored":
            k = None
        if state.settings["echo"] and body.get("echo"):
            k = body["logprobs"]
        fault = state.fault("score" if k is not None else "generate")
        kind = fault["kind"] if fault else ""
        if kind.isdigit():
            headers = {"Retry-After": str(fault["retry_after"])} if fault and "retry_after" in fault else {}
            return self.answer({"error": {"message": f"scripted {kind}"}}, int(kind), headers)
        if kind == "hang":
            time.sleep(60)
        if kind == "die":
            os._exit(1)
        if kind == "garbage":
            return self.answer("<html>502 Bad Gateway</html>")
        if k is not None and k > state.settings["max_logprobs"]:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed"
            return self.answer({"error": {"message": message}}, 400)
        if state.settings["window"] and len(body["prompt"]) + body["max_tokens"] > state.settings["window"]:
            return self.answer({"error": {"message": "longer than the maximum model length"}}, 400)
        choice = self.choice(body, k)
        if kind == "wrong_ids" and "prompt_logprobs" in choice:
            choice["prompt_logprobs"] = [None, *choice["prompt_logprobs"][:1], *choice["prompt_logprobs"][1:-1]]
        elif kind == "wrong_ids":
            choice["prompt_token_ids"] = [1, 2, 3]
        if kind == "no_logprobs":
            choice.pop("prompt_logprobs", None)
        if kind == "no_text":
            choice["text"] = None
        if kind == "half_json":  # a whole answer of HTTP with half a JSON in it
            text = json.dumps({"choices": [choice]})
            return self.answer(text[: len(text) // 2])
        self.answer({"choices": [choice]}, cut=kind == "cut_off")

    def choice(self, body: dict[str, Any], k: int | None) -> dict[str, Any]:
        state, ids = self.state, body["prompt"]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "text": ""}
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = ids
        if k is not None:
            table = state.logprobs(ids)
            if state.settings["echo"] and body.get("echo"):
                return {**choice, "logprobs": self.legacy(ids, table, k)}
            choice["prompt_logprobs"] = [None] + [
                {
                    str(i): {"logprob": float(table[p - 1, i]), "decoded_token": "?"}
                    for i in dict.fromkeys([ids[p], *np.argsort(-table[p - 1])[:k].tolist()])
                }
                for p in range(1, len(ids))
            ]
            return choice
        if state.settings["say"] is not None:
            choice["text"] = state.settings["say"].replace("{seed}", str(body.get("seed")))
            return choice
        rng = np.random.default_rng(body.get("seed"))
        written: list[int] = []
        eos = state.tokenizer.eos_token_id if state.tokenizer is not None else -1
        while len(written) < body["max_tokens"] and eos not in written:
            row = state.logprobs([*ids, *written])[-1]
            written.append(int(rng.choice(len(row), p=np.exp(row))))
        choice["finish_reason"] = "stop" if eos in written else "length"
        choice["text"] = state.tokenizer.decode(written, skip_special_tokens=True) if state.tokenizer else "?"
        if body.get("return_token_ids"):
            choice["token_ids"] = written
        return choice

    def legacy(self, ids: list[int], table: np.ndarray, k: int) -> dict[str, Any]:
        """The log-probs of OpenAI's completions: by text, with the one generated token at the end."""
        tokenizer, way = self.state.tokenizer, self.state.settings["echo"]

        def name(token: int) -> str:
            if way == "id":
                return f"token_id:{token}"
            if token >= len(tokenizer):  # a column of padding
                return f"<unused {token}>"
            return str(tokenizer.decode([token]) if way == "text" else tokenizer.convert_ids_to_tokens(token))

        written = [*ids, int(np.argmax(table[-1]))]
        likeliest = [{name(i): float(row[i]) for i in np.argsort(-row)[:k].tolist()} for row in table]
        return {
            "tokens": [name(i) for i in written],
            "token_logprobs": [None] + [float(row[i]) for row, i in zip(table, written[1:], strict=True)],
            "top_logprobs": [None, *likeliest],
        }


if __name__ == "__main__":
    Handler.state = State(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
