"""A whole on-policy step beside TRL's trainers: sampling, teacher, loss, backward, optimiser.

Each provider runs in processes of its own, in turns. Models are random and small, the vocabulary is a
real one's size, so that most of the work is where it is in large models that are distilled: at the heads.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "benchmarks" / "trainer_worker.py"
PROVIDERS = ("ours", "trl", "trl gkd")
VOCABULARY, PROMPTS, TOKENS, STEPS, ROUNDS = 151936, 16, 32, 3, 3


def make_tokenizer():
    """One token a word, as many words as the vocabulary has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    words = special + [f"w{i}" for i in range(VOCABULARY - len(special))]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, eos_token=special[0], pad_token=special[1], unk_token=special[4]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<|end|> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return tokenizer


def make_model(folder: Path, tokenizer, hidden: int, layers: int, seed: int) -> str:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.base_model.norm.weight.data.mul_(10)  # entropies like those of a trained model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def launch(provider: str, settings: Path) -> dict:
    processes = json.loads(settings.read_text()).get("processes", 1)
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *several, str(WORKER), provider, str(settings)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def test_step_beside_other_trainers(tmp_path, record, guard):
    tokenizer = make_tokenizer()
    data = tmp_path / "prompts.jsonl"
    with data.open("w") as out:
        for i in range(PROMPTS):
            words = " ".join(f"w{(i * 7919 + j * 31) % 150000}" for j in range(12))
            out.write(json.dumps({"prompt": [{"role": "user", "content": words}]}) + "\n")
    settings = {
        "student": make_model(tmp_path / "student", tokenizer, 256, 4, 0),
        "teacher": make_model(tmp_path / "teacher", tokenizer, 512, 6, 1),
        "data": str(data),
        "folder": str(tmp_path / "run"),
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "steps": STEPS,
        "learning_rate": 1e-6,
        "threads": torch.get_num_threads(),
    }
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    found: dict[str, list[dict]] = {name: [] for name in PROVIDERS}
    for _ in range(ROUNDS):
        for name in PROVIDERS:
            found[name].append(launch(name, file))
    case = {}
    for name, runs in found.items():
        case[name] = {key: statistics.median(run[key] for run in runs) for key in ("step_s", "peak_bytes")}
        case[name]["loss"] = statistics.median(statistics.mean(run["losses"]) for run in runs)
        print(name, case[name])
    record("step", case)
    assert abs(case["trl"]["loss"] / case["ours"]["loss"] - 1) < 0.1  # the same work
    ours, theirs = case["ours"], case["trl"]
    figures = {
        "over_trl": ours["step_s"] / theirs["step_s"],
        "memory_over_trl": ours["peak_bytes"] / theirs["peak_bytes"],
    }
    guard("step", {name: (value, 0.15) for name, value in figures.items()})
