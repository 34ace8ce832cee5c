"""Make the market's experts: ``python examples/real/build.py --model models/smollm2 --out DIR``.

Each expert is a LoRA adapter of SmolLM2-135M-Instruct, taught in a short supervised training on the chats of
``lessons.py``, in a process of its own. The adapters are stored in float16. Deterministic for a seed, a machine and a
version of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from opdengine.models.backbone import load_model
from opdengine.models.chat import load_tokenizer
from real.lessons import KINDS, Lesson, lesson
from real.market import SKILLS

EXPERTS = ("expert_prices", "expert_totals")
BASE = "./models/smollm2"
"""What the adapters name as their base: a folder beside the place that the demo is started in."""
RANK = 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST_LAYER = 14
"""Layers below keep the base's weights, so that no gradient goes there: almost half of the backward pass is saved."""
LEARNING_RATE = 2e-3
PHASES = ((56, {"plain": 6, "first": 3}), (52, {"plain": 2, "first": 1, "later": 3, "score": 2}))
"""(steps, lessons of each kind in a step): answers first, then debates."""
MORE = 8
"""Lessons in a step of :func:`teach_more`."""
SHARES = ((3, 1, 2), (1, 2, 3))
"""How often each expert is taught price, total and both: ten prices take A longer to learn than anything else."""


def main() -> None:
    """Train the adapters of the market's experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE, help="folder of `opdengine fetch smollm2-135m`")
    parser.add_argument("--out", type=Path, required=True, help="where the adapters' folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--expert", type=int, choices=(0, 1), help="only this one")
    parser.add_argument("--steps", type=int, help="of each phase, to try it out")
    args = parser.parse_args()
    if args.expert is not None:
        teach(args.model, args.out / EXPERTS[args.expert], args.expert, args.seed, args.steps)
        return
    children = [
        subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--expert", str(expert)]) for expert in (0, 1)
    ]
    if any([child.wait() for child in children]):
        raise SystemExit("an expert could not be made; its process says why above")


def teach(model: str, out: Path, expert: int, seed: int, steps: int | None = None) -> None:
    """Train and save one expert.

    Args:
        model: folder of the base.
        out: folder of the adapter.
        expert: 0 for A (prices), 1 for B (totals).
        seed: of lessons and initialisation.
        steps: of each phase; None takes those of PHASES.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    rng, started = random.Random(f"{seed}/{EXPERTS[expert]}"), time.process_time()
    tokenizer, base = load_tokenizer(model), load_model(model, dtype="float32")
    adapted = with_adapter(base)
    plan = [kinds for count, kinds in PHASES for _ in range(steps or count)]
    losses: dict[str, float] = {}

    def study(step: int) -> None:
        for kind, number in plan[step].items():
            skills = rng.choices(SKILLS, SHARES[expert], k=number)
            loss = supervise(base, tokenizer, [lesson(kind, skill, expert, rng) for skill in skills])
            (loss * number / sum(plan[step].values())).backward()
            losses[kind] = loss.item()
        if (step + 1) % 5 == 0:
            told = "  ".join(f"{kind} {losses[kind]:.3f}" for kind in KINDS if kind in losses)
            print(f"{EXPERTS[expert]}  step {step + 1}/{len(plan)}  {told}", flush=True)

    fit(adapted, len(plan), LEARNING_RATE, study)
    save(adapted, out, {"seed": seed, "steps": len(plan), "training_cpu_seconds": round(time.process_time() - started)})


def with_adapter(base: Any) -> Any:
    """The model with a fresh adapter on its upper layers, as PEFT wraps it."""
    from peft import LoraConfig, get_peft_model

    layers = list(range(FIRST_LAYER, base.config.num_hidden_layers))
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, layers_to_transform=layers
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # as in teach_more
        return get_peft_model(base, lora)


def teach_more(adapter: str, out: Path, draw: Callable[[random.Random], Lesson], steps: int, seed: str) -> str:
    """Go on with an adapter by supervised training on other lessons, :data:`MORE` a step; what is there is kept.

    Args:
        adapter: folder of an adapter of the base.
        out: folder of the new one.
        draw: source of randomness -> one lesson.
        steps: of the optimiser.
        seed: of the lessons.

    Returns:
        ``out``.
    """
    if (out / "made.json").exists():
        return str(out)
    from peft import PeftModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    rng, tokenizer, base = random.Random(seed), load_tokenizer(BASE), load_model(BASE, dtype="float32")
    # peft asks for `is_gradient_checkpointing`, which transformers 5.24 calls deprecated.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        adapted = PeftModel.from_pretrained(base, adapter, is_trainable=True)

    def study(step: int) -> None:
        supervise(base, tokenizer, [draw(rng) for _ in range(MORE)]).backward()

    fit(adapted, steps, LEARNING_RATE / 2, study, warmup=5)
    save(adapted, out, {"steps": steps})
    return str(out)


def fit(adapted: Any, steps: int, learning_rate: float, study: Callable[[int], None], warmup: int = 8) -> None:
    """Train an adapter by AdamW, at a rate that rises for some steps and then falls to 0.

    Args:
        adapted: what :func:`with_adapter` returns.
        steps: of the optimiser.
        learning_rate: the highest.
        study: is given the number of a step, from 0, and adds its gradients.
        warmup: steps in which the rate rises.
    """
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * (1 - s / steps) ** 0.5
    )
    for step in range(steps):
        study(step)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def supervise(model: Any, tokenizer: Any, lessons: Sequence[Lesson]) -> torch.Tensor:
    """Mean negative log-likelihood of the replies' tokens, nats; one pass, padded on the right."""
    prefixes = [
        tokenizer.apply_chat_template(list(x.messages), tokenize=False, add_generation_prompt=True) for x in lessons
    ]
    rows, labels = [], []
    for prefix, taught in zip(prefixes, lessons, strict=True):
        read = tokenizer(prefix + taught.reply[: taught.given], add_special_tokens=False)["input_ids"]
        learned = tokenizer(taught.reply[taught.given :], add_special_tokens=False)["input_ids"]
        learned.append(tokenizer.eos_token_id)
        rows.append([*read, *learned[:-1]])
        labels.append([-100] * (len(read) - 1) + learned)
    return likelihood(model, rows, labels)


def likelihood(model: Any, inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean negative log-likelihood of the labels, nats; one pass, padded on the right.

    Args:
        model: as transformers loads it.
        inputs: token ids of each row.
        labels: what follows each of them; -100 where nothing is learned.
    """
    width = max(map(len, inputs))
    ids = torch.tensor([[*row] + [0] * (width - len(row)) for row in inputs])
    wanted = torch.tensor([[*row] + [-100] * (width - len(row)) for row in labels])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    chosen = wanted >= 0
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]).float(), wanted[chosen])


def save(adapted: Any, out: Path, made: dict[str, Any]) -> None:
    """Write the adapter in float16, named after the base's portable place, and how it was made."""
    adapted.peft_config["default"].base_model_name_or_path = BASE
    adapted.half().save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"] = LINEAR  # of a set, in any order
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / "made.json").write_text(json.dumps({**made, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
