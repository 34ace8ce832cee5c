"""One process of ``test_two_processes_train_alike``: trains four times, and the first rank writes the losses down."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from peft import LoraConfig

import trl_gkd

if __name__ == "__main__":
    folder, found = Path(sys.argv[1]), {}
    for kind in ("FusedGKDTrainer", "GKDTrainer"):
        for name in ("plain", "lora"):
            lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if name == "lora" else None
            options = {"per_device_train_batch_size": 2, "max_new_tokens": 4}
            trainer = trl_gkd.gkd(str(folder / f"{kind} {name}"), 2, getattr(trl_gkd, kind), lora, **options)
            trainer.train()
            found[f"{kind} {name}"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found))
