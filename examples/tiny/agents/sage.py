"""SAGE-OPD beside its baselines and controls on the tiny agents; ``python examples/train_sage_opd.py`` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny.agents import world
from tiny.agents.arms import MODELS, Arm, main, parser

SHORT = ("opd", "sage", "intervention", "no_confidence")


def arms() -> list[Arm]:
    """Everything that is compared; the demo shows :data:`SHORT`."""
    plain = {"use_confidence": False, "normalization": "none"}

    def sage(name: str, title: str, **settings: Any) -> Arm:
        judge = {"judge_prompt": world.JUDGE_PROMPT, "judge_max_tokens": 2}
        return arm(name, title, "sage_opd", sage={**judge, **settings})

    return [
        arm("opd", "OPD", "opd"),
        sage("sage", "SAGE-OPD"),
        sage("intervention", "intervention only (no confidence, Z = 1)", **plain),
        sage("no_confidence", "intervention + Z, no confidence", use_confidence=False),
        sage("no_z", "intervention x confidence, Z = 1", normalization="none"),
        sage("confidence", "confidence + Z only (no intervention)", use_judge=False, use_failures=False),
        arm("opd_2", "OPD, 2 rollouts a game", "opd", num_generations=2),
        arm("tcod", "TCOD (first turns first)", "tcod"),
        arm("entropy", "entropy-aware OPD", "entropy_opd"),
        sage("random", "SAGE-OPD, random turns, same rate", intervention="random"),
        sage("inverted", "SAGE-OPD, inverted, same rate", intervention="inverted"),
        sage("history", "SAGE-OPD, judge sees history", judge_history=True),
        sage("next_obs", "SAGE-OPD, judge sees what happened", judge_next_observation=True),
        arm("sft", "supervised on the teacher's episodes", "mt_seqkd"),
        arm("sft_won", "supervised on those it wins", "mt_seqkd", mt_seqkd={"successful_only": True}),
    ]


def arm(name: str, title: str, method: str, **settings: Any) -> Arm:
    """One arm with the teacher that all share."""
    teachers = [{"model": str(MODELS / "teacher")}]
    return Arm(name, title, {"method": method, "teachers": teachers, **settings})


def demo(arguments: Sequence[str] = ()) -> int:
    """Compare and report."""
    options = parser(__doc__, steps=12, learning_rate=1e-3, batch_size=16, test_games=100).parse_args(arguments)
    chosen = [a for a in arms() if options.ablate or options.arms or a.name in SHORT]
    return main("SAGE-OPD demo", chosen, options)
