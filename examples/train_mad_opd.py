"""Multi-agent-debate on-policy distillation (MAD-OPD, arXiv 2605.01347).

python examples/train_mad_opd.py                          the demo on the bundled tiny models
python examples/train_mad_opd.py --seeds 5                the same with standard deviations
python examples/train_mad_opd.py --config my.yaml         your own models and prompts
python examples/train_mad_opd.py --config my.yaml --learning_rate 2e-6 --debate.rounds 3
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """The engine's trainer with a configuration, the demo without one."""
    if any(a == "--config" or a.startswith("--config=") for a in arguments):
        from opdengine.cli import main as opdengine

        return opdengine(["train", *arguments])
    from tiny.demo import main as demo

    return demo(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
