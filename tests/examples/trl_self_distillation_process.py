"""One process of SDFT's ``test_two_processes_train_alike``: trains twice, and the first rank writes the losses down."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from test_trl_gkd import losses
from test_trl_self_distillation import FusedSDFTTrainer, sdft
from trl.experimental.sdft import SDFTTrainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    kinds = (FusedSDFTTrainer, SDFTTrainer)
    found = [losses(sdft(folder / kind.__name__, kind, 2, per_device_train_batch_size=2)) for kind in kinds]
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found))
