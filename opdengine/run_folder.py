"""The output folder of a run: an existing run is resumed or refused, never overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from opdengine.checkpoint import find_checkpoint, read_state
from opdengine.config import ConfigError, TrainConfig, to_mapping

MAY_CHANGE = {
    "resume_from_checkpoint", "max_tokens_per_batch", "workspace_bytes", "loss_impl",
    "logging_steps", "eval_steps", "save_steps", "save_total_limit", "log_completions",
    "report_to", "run_name", "output_dir", "eval_data", "eval_max_prompts",
    "attn_implementation",
}  # fmt: skip
"""Settings that a resumed run may have differently: they do not change what is learned."""


class RunFolder:
    """Opens the folder before any model is loaded.

    Args:
        config: of the run.

    Raises:
        ConfigError: the folder holds another run, or the run to resume had other settings.
        CheckpointError: there is nothing to resume.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.output_dir)
        self.checkpoint: Path | None = None
        existing = self.path / "config.yaml"
        if config.resume_from_checkpoint is not None:
            self.checkpoint = find_checkpoint(self.path, config.resume_from_checkpoint)
            if existing.is_file():
                _require_same(yaml.safe_load(existing.read_text()), to_mapping(config))
        elif existing.is_file():
            raise ConfigError(
                f"output_dir={config.output_dir!r} already holds a run; continue it with "
                "--resume_from_checkpoint latest, or choose another folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is None:
            existing.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))

    @property
    def state(self) -> dict[str, Any]:
        """What the checkpoint to resume from holds; empty for a new run."""
        return {} if self.checkpoint is None else read_state(self.checkpoint)


def _require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*before, *now} - MAY_CHANGE)
        if before.get(key) != now.get(key)
    ]
    if changed:
        listing = "\n".join(changed)
        raise ConfigError(
            f"the run to resume had other settings:\n{listing}\n"
            "Resume with the same settings, or start a new run in another output_dir."
        )
