"""Helpers of the engine's tests are used here too."""

import sys
from pathlib import Path

for room in ("engine", "agents"):
    sys.path.append(str(Path(__file__).parents[1] / room))
