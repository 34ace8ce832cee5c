"""Runs a program of these tests on the pretend device (``pretend_device.py``): a tensor that is left on the CPU raises.

python -m torch.distributed.run --nproc-per-node 2 on_pretend_device.py step_worker.py cases.json out.pt
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from pretend_device import DEVICE

from opdengine.models import backbone
from opdengine.training import build, build_student

for module in (backbone, build, build_student):
    module.default_device = lambda: DEVICE  # type: ignore[attr-defined]

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
