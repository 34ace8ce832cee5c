"""Trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases and Trackio.

A tracker is what has :meth:`Tracker.log`, :meth:`Tracker.table` and :meth:`Tracker.close`. One that fails ends no run:
the files of the run hold everything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import netrc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from uuid import uuid4

from opdengine.config.loading import to_mapping
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError

NOTE = "trackers.json"
"""What a resumed run needs to go on in the same run of a tracker."""

PROJECT = "opdengine"
ROWS, CHARACTERS = 32, 4000
"""Most rows of a table, and characters of a cell; the files of the run hold all."""

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Something that shows runs."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step; one that is done again comes again."""

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Take rows, all with the same keys, of what was sampled or graded in a step."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run; it has no tables."""

    def __init__(self, config: TrainConfig, folder: Path, last_step: int, known: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """TensorBoard shows numbers."""

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in ``wandb/`` of the run; with ``WANDB_MODE=offline`` nothing leaves this machine."""

    def __init__(self, config: TrainConfig, folder: Path, last_step: int, known: dict[str, Any]) -> None:
        import wandb

        known.setdefault("project", config.project or os.environ.get("WANDB_PROJECT") or PROJECT)
        known.setdefault("id", uuid4().hex[:8])
        self._wandb = wandb
        self._run: Any = wandb.init(
            project=known["project"],
            id=known["id"],
            resume="allow",
            name=config.run_name or folder.resolve().name,
            dir=str(folder),
            config=to_mapping(config),
            # Its copies of the terminal and of the code, and the address of the repository, are not asked for.
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
            allow_val_change=True,
        )
        # Steps that are done again after a resume would be refused as a history's own steps.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        table = self._wandb.Table(columns=list(rows[0]), data=[[*row.values()] for row in rows])
        self._run.log({"step": step, name: table})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, in its local database (``TRACKIO_DIR``) or where its own variables send it."""

    def __init__(self, config: TrainConfig, folder: Path, last_step: int, known: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            import trackio

            resume = "allow" if known else "never"
            known.setdefault("project", config.project or os.environ.get("TRACKIO_PROJECT") or PROJECT)
            known.setdefault("name", f"{config.run_name or folder.resolve().name}-{uuid4().hex[:8]}")
            self._trackio: Any = trackio
            self._run: Any = trackio.init(
                project=known["project"],
                name=known["name"],
                resume=resume,
                config=json.loads(json.dumps(to_mapping(config), default=str)),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        table = self._trackio.Table(columns=list(rows[0]), data=[[*row.values()] for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


OPENED: Mapping[str, Callable[[TrainConfig, Path, int, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
PACKAGES = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install 'opdengine[trackers]'",
    "trackio": "pip install 'opdengine[trackers]'",
}


def require_trackers(report_to: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed, or has nobody to report to."""
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: [{name}] needs a package: {PACKAGES[name]}")
    if "wandb" in report_to and not _can_reach_wandb():
        raise ConfigError(
            "report_to: [wandb] needs a login: run 'wandb login', set WANDB_API_KEY, or set WANDB_MODE=offline to keep "
            "everything on this machine"
        )


def _can_reach_wandb() -> bool:
    if os.environ.get("WANDB_MODE", "online").lower() in ("offline", "dryrun", "disabled"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC", "~/.netrc"), "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
    return False


def open_trackers(config: TrainConfig, folder: Path, last_step: int) -> dict[str, Tracker]:
    """The trackers that a run reports to, by name.

    A run that goes on (``last_step`` is not negative) does so in the same run of a tracker.

    Args:
        config: of the run.
        folder: of the run; what :data:`NOTE` in it says is kept.
        last_step: steps of a tracker that come after it are those of a run that was interrupted.

    Raises:
        ConfigError: one of them cannot begin; names the remedy.
    """
    note = folder / NOTE
    known: dict[str, dict[str, Any]] = json.loads(note.read_text("utf-8")) if note.is_file() and last_step >= 0 else {}
    trackers: dict[str, Tracker] = {}
    with contextlib.ExitStack() as undo:
        for name in config.report_to:
            own = known.setdefault(name, {})
            try:
                trackers[name] = OPENED[name](config, folder, last_step, own)
            except Exception as error:  # each has errors of its own
                said = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(
                    f"report_to: {name} could not begin ({said}); correct that, or leave it out"
                ) from error
            undo.callback(_give_up, trackers[name])
        if told := {name: own for name, own in known.items() if own}:
            note.write_text(json.dumps(told, indent=1), "utf-8")
        undo.pop_all()
    return trackers


def _give_up(tracker: Tracker) -> None:
    """Close a tracker of a run that does not begin; what has kept the run from it counts."""
    with contextlib.suppress(Exception):
        tracker.close()


def rows_for_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first rows, all with the same keys; chats become text, and other nested values JSON, of a bounded length."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: _cell(row.get(name)) for name in names} for row in rows[:ROWS]]


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        value = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text)} characters)"
