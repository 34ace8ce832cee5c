"""Uni-OPD with pictures: a tiny vision-language student learns to name shapes (arXiv 2605.03677).

python examples/train_uni_opd_vl.py                    a teacher that sees, plain OPD beside it, one that reads captions
python examples/train_uni_opd_vl.py --ablate           all controls, 5 seeds, mean and 95 % interval
python examples/train_uni_opd_vl.py --arms cross_modal             the teacher that reads captions alone
python examples/train_uni_opd_vl.py --config my.yaml   your own models and pictures
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """The engine's trainer with a configuration, the study without one."""
    if any(a == "--config" or a.startswith("--config=") for a in arguments):
        from opdengine.cli import main as opdengine

        return opdengine(["train", *arguments])
    from tiny.pictures.study import STUDY
    from tiny.study import main as study

    return study(STUDY, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
