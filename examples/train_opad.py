"""Step-level debate distillation for agents (OPAD; MAD-OPD, arXiv 2605.01347, section 4.4).

python examples/train_opad.py                          the demo on bundled tiny models in a little house
python examples/train_opad.py --ablate                 every baseline and control, five seeds
python examples/train_opad.py --config my.yaml         your own models and environment
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """The engine's trainer with a configuration, the demo without one."""
    if any(a == "--config" or a.startswith("--config=") for a in arguments):
        from opdengine.cli import main as opdengine

        return opdengine(["train", *arguments])
    from tiny.agents.opad import demo

    return demo(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
