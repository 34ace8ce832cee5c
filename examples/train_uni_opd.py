"""Outcome-guided on-policy distillation (Uni-OPD, arXiv 2605.03677).

python examples/train_uni_opd.py                       two imperfect tiny teachers and a verifier
python examples/train_uni_opd.py --ablate              all controls, 5 seeds, mean and 95 % interval
python examples/train_uni_opd.py --max_steps 40 --learning_rate 1e-3       other settings for all arms
python examples/train_uni_opd.py --config my.yaml      your own models and prompts
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """The engine's trainer with a configuration, the study without one."""
    if any(a == "--config" or a.startswith("--config=") for a in arguments):
        from opdengine.cli import main as opdengine

        return opdengine(["train", *arguments])
    from tiny.study import main as study
    from tiny.uni_study import STUDY

    return study(STUDY, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
