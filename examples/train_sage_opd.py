"""Selective turn intervention for agents (SAGE-OPD, arXiv 2606.19659).

python examples/train_sage_opd.py                          the demo on bundled tiny models in a little house
python examples/train_sage_opd.py --ablate                 every baseline and control, five seeds
python examples/train_sage_opd.py --config my.yaml         your own models and environment
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """The engine's trainer with a configuration, the demo without one."""
    if any(a == "--config" or a.startswith("--config=") for a in arguments):
        from opdengine.cli import main as opdengine

        return opdengine(["train", *arguments])
    from tiny.agents.sage import demo

    return demo(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
