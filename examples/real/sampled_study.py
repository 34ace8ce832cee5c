"""Whole trainings with gradients from sampled columns beside dense ones, at the same questions and settings.

python examples/real/sampled_study.py --seeds 3 --jobs 1 --save_results benchmarks/results/real/sampled_training.json

All weights of SmolLM2-135M-Instruct are trained; the teacher is the expert of totals, the loss the exact reverse KL.
With ``vocab_sample`` the gradient of the loss comes from that share of the 49,152 columns. About an hour of one core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real import study as debate_study
from real.demo import ROOT, SKILLS, fetch
from tiny.study import Arm, Study
from tiny.study import main as run_study

ARMS = (
    Arm("dense", "dense", {}, demo=True),
    Arm("sampled", "a tenth of the columns", {"vocab_sample": 0.1}, demo=True),
)
REPORTED = ("gradient_noise", "loss", "timing/update", "timing/step")


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """Those of the demo, with one teacher, all weights trained and four rollouts of each question."""
    shared = debate_study.settings(folder, seed)
    del shared["debate"], shared["lora"]
    return {
        **shared,
        "method": "opd",
        "teachers": [debate_study.TOTALS],
        "divergence": "reverse_kl",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "learning_rate": 5e-5,
        "max_steps": 32,
        "eval_steps": 8,
    }


STUDY = Study("real_sampled", ARMS, SKILLS, debate_study.prepare, settings, REPORTED)

if __name__ == "__main__":
    os.chdir(ROOT)
    fetch()
    sys.exit(run_study(STUDY, __doc__ or "", sys.argv[1:]))
