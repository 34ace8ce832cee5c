"""Does the debate help? MAD-OPD on the market beside its controls, all of them with the same questions and temperature.

python examples/real/study.py --seeds 3 --jobs 2
python examples/real/study.py --arms mad_opd uniform --max_steps 10       some arms, other settings

Hours on two cores. The arms that debate between the same two experts share one folder of transcripts, so that uniform
weights and confidences act on the very debates of MAD-OPD.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opdengine.config.loading import read_settings
from opdengine.config.yaml_text import plain
from opdengine.metrics import write_jsonl
from real.demo import CONFIG, ROOT, SKILLS, fetch, held_out
from tiny.study import Arm, Study
from tiny.study import main as run_study

ADAPTERS = "examples/real/adapters"
PRICES, TOTALS = ({"model": f"{ADAPTERS}/expert_{name}", "dtype": "float32"} for name in ("prices", "totals"))
ARMS = (
    Arm("mad_opd", "MAD-OPD", {}, demo=True),
    Arm("uniform", "uniform weights, same transcripts", {"debate": {"tau": float("inf")}}, demo=True),
    Arm("confidences", "confidences, no transcript", {"debate": {"use_transcript": False}}, demo=True),
    Arm("mt_opd", "MT-OPD", {"method": "mt_opd"}, demo=True),
    Arm("opd_prices", "OPD, expert of prices", {"method": "opd", "teachers": [PRICES]}),
    Arm("opd_totals", "OPD, expert of totals", {"method": "opd", "teachers": [TOTALS]}, demo=True),
    Arm(
        "self_debate",
        "self-debate of the expert of totals",
        {"teachers": [{**TOTALS, "name": "first"}, {**TOTALS, "name": "second"}]},
        demo=True,
    ),
)


def prepare(folder: Path, seeds: Sequence[int], split: str) -> dict[str, str]:
    """The held-out questions; the experts and the student are graded on them."""
    if split != "test":
        raise SystemExit("the market has training questions and test questions only: leave --split out")
    write_jsonl(folder / "held_out.jsonl", held_out())
    experts = {f"expert of {name}, asked plainly": f"{ADAPTERS}/expert_{name}" for name in ("prices", "totals")}
    return {"student before": "models/smollm2", **experts}


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """Those of the demo's configuration, with debates kept for all runs of the study."""
    shared = plain(read_settings(ROOT / CONFIG))
    shared["debate"] = {**shared["debate"], "cache_dir": str(folder / "debates")}
    return {**shared, "verifier_workers": 1, "log_completions": False}


REPORTED = (
    "debate/confidence/expert_prices",
    "debate/confidence/expert_totals",
    "debate/equal_confidences",
    "debate/weight_entropy",
    "teacher_weight/expert_prices",
    "teacher_weight/expert_totals",
    "loss",
)
STUDY = Study("real_debate", ARMS, SKILLS, prepare, settings, REPORTED)

if __name__ == "__main__":
    os.chdir(ROOT)
    fetch()
    sys.exit(run_study(STUDY, __doc__ or "", sys.argv[1:]))
