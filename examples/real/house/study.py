"""SAGE-OPD and OPAD with SmolLM2-135M-Instruct in the little house, beside their baselines.

python examples/real/house/study.py sage --seeds 3 --save_results benchmarks/results/real/sage.json
python examples/real/house/study.py opad --seeds 3 --save_results benchmarks/results/real/opad.json

Teacher, student and experts are taught first (``build.py``), where ``--agents DIR`` does not hold them yet. Models are
in bfloat16; on a processor that does not multiply it ``--dtype float32`` is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from real.demo import ROOT, fetch
from real.house.lessons import JUDGE_PROMPT, MAX_PROMPT, MAX_TOKENS
from tiny.agents import arms as tiny_arms
from tiny.agents import world
from tiny.agents.arms import Arm

SHARED: dict[str, Any] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": r".*\.layers\.(1[4-9]|2\d)\..*_proj"},
}
DEBATE: dict[str, Any] = {
    "prompts": world.DEBATE_PROMPTS, "rounds": 2, "tau": 1.0, "temperature": 0.0, "top_p": 1.0, "top_k": 0,
    "repetition_penalty": 1.0, "max_tokens": 16,
}  # fmt: skip


def sage(agents: Path) -> list[Arm]:
    """SAGE-OPD beside OPD and three controls."""
    teachers = [{"model": str(agents / "teacher")}]
    judge = {"judge_prompt": JUDGE_PROMPT, "judge_max_tokens": 4}

    def arm(name: str, title: str, **settings: Any) -> Arm:
        return Arm(name, title, {"method": "sage_opd", "teachers": teachers, "sage": {**judge, **settings}})

    return [
        Arm("opd", "OPD", {"method": "opd", "teachers": teachers}),
        arm("sage", "SAGE-OPD"),
        arm("random", "SAGE-OPD, random turns, same rate", intervention="random"),
        arm("no_confidence", "intervention + Z, no confidence", use_confidence=False),
    ]


def opad(agents: Path) -> list[Arm]:
    """OPAD beside both experts without a debate and each alone."""
    both = [{"model": str(agents / name)} for name in ("expert_bring", "expert_open")]
    sampled = {"sampling": "uniform", "steps_per_trajectory": 3}

    def arm(name: str, title: str, method: str, teachers: Sequence[Any] = both, **settings: Any) -> Arm:
        return Arm(name, title, {"method": method, "teachers": list(teachers), "divergence": "jsd", **settings})

    return [
        arm("opad", "OPAD, 3 steps an episode", "opad", debate=DEBATE, opad=sampled),
        arm("mt_opd", "MT-OPD (both, no debate)", "mt_opd"),
        arm("opd_bring", "OPD, expert_bring", "opd", both[:1]),
        arm("opd_open", "OPD, expert_open", "opd", both[1:]),
    ]


JUDGED = 150
"""Actions about which the judge is asked, to measure it."""
STUDIES = {"sage": sage, "opad": opad}
AGENTS = {"sage": ("student", "teacher"), "opad": ("student", "expert_bring", "expert_open")}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What else the results hold: games that SmolLM2 wins as it comes and its teachers win, and the judge's words."""
    from opdengine.models.backbone import load_model
    from opdengine.models.chat import load_tokenizer
    from tiny.agents.measure import judge, play

    games = tiny_arms.held_out(options.test_games)
    players = {"SmolLM2 as it comes": "models/smollm2"}
    players |= {name: str(options.agents / name) for name in AGENTS[options.study][1:]}
    found: dict[str, Any] = {"players": {}}
    for title, folder in players.items():
        model, tokenizer = load_model(folder, dtype=options.dtype), load_tokenizer(folder)
        found["players"][title] = play(model, tokenizer, games, 0.0, options.longest, options.window)
        if title == "teacher":
            unseen = games["valid_unseen"]
            found["judge"] = judge(model, tokenizer, unseen, JUDGED, judge_prompt=JUDGE_PROMPT, longest=4)
    return found


def main(arguments: Sequence[str]) -> int:
    """Teach what is missing, compare, and report."""
    options = tiny_arms.parser(__doc__, steps=24, learning_rate=2e-3, batch_size=8, test_games=40)
    options.add_argument("study", choices=list(STUDIES))
    options.add_argument("--agents", type=Path, default=Path("runs/house"), help="folders of build.py")
    options.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of all models")
    options.set_defaults(longest=MAX_TOKENS, window=MAX_PROMPT, more=SHARED, output_dir=Path("runs/real_house"))
    chosen: argparse.Namespace = options.parse_args(arguments)
    chosen.student = str(chosen.agents / "student")
    missing = [name for name in AGENTS[chosen.study] if not (chosen.agents / name / "made.json").is_file()]
    if missing:
        build = [sys.executable, str(Path(__file__).with_name("build.py")), "--out", str(chosen.agents)]
        subprocess.run([*build, "--only", *missing], check=True)
    status = tiny_arms.main(f"{chosen.study} in the house", STUDIES[chosen.study](chosen.agents), chosen)
    if status == 0 and chosen.save_results:
        results = json.loads(chosen.save_results.read_text())
        chosen.save_results.write_text(json.dumps(results | measured(chosen), indent=1) + "\n")
    return status


if __name__ == "__main__":
    os.chdir(ROOT)
    fetch()
    sys.exit(main(sys.argv[1:]))
