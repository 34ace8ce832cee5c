"""Counteraction-aware multi-teacher on-policy distillation (CaMOPD, arXiv 2605.27115).

python examples/train_camopd.py                       a specialised tiny model recovers what it forgot
python examples/train_camopd.py --ablate              all controls, 5 seeds, mean and 95 % interval
python examples/train_camopd.py --max_steps 40 --learning_rate 1e-3       other settings for all arms
python examples/train_camopd.py --config my.yaml      your own models and prompts
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """The engine's trainer with a configuration, the study without one."""
    if any(a == "--config" or a.startswith("--config=") for a in arguments):
        from opdengine.cli import main as opdengine

        return opdengine(["train", *arguments])
    from tiny.camopd_study import STUDY
    from tiny.study import main as study

    return study(STUDY, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
