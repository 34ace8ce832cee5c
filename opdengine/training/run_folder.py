"""The output folder of a run: an existing run is resumed or refused, never overwritten.

A run that ended before its first step was finished has trained nothing: the next one takes its place and
finds its cached debates.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from opdengine.config.fields import at_home
from opdengine.config.loading import from_mapping, read_settings, to_mapping
from opdengine.config.section import CHANGEABLE
from opdengine.config.train import TrainConfig
from opdengine.config.yaml_text import dump_yaml
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError, WriteError
from opdengine.models.checkpoint import find_checkpoint, list_checkpoints, read_state, step_of
from opdengine.models.given import PREFIX
from opdengine.training.changes import (
    CHANGES,
    Change,
    Contents,
    accept,
    changes,
    contents_of_models,
    note_changes,
    require_same_models,
    speak_of_schedule,
)
from opdengine.training.trackers import NOTE
from opdengine.training.writer import read_metrics
from opdengine.workers.printing import brief

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Locked by the process that writes to the folder."""

LOGS = ("rollouts", "tokens", "debates", "verdicts", "evaluations", "bad_steps")
"""Folders with one file for each step, ``step_N.jsonl`` (of tokens ``step_N.npz``)."""

ABANDONED = "abandoned"
"""This folder takes everything after a step where a run is continued from there although later checkpoints exist."""

NOT_HERE = f"""\
# What begins with "{PREFIX}" was given to opdengine.train in Python as an object, and is not kept in this folder. The
# run can be repeated, or continued from a checkpoint, only from Python and with the same objects.
"""

OWN = ("config.yaml", "metrics.jsonl", "checkpoints", "final")
"""A folder that holds one of these files holds a run."""

TRAINED = ("checkpoints/*", "checkpoints/.*.partial", "rollouts/*", "final", "merged")
"""A run with one of these, or with metrics, has finished a step."""


class RunFolder:
    """Checks the folder before any model is loaded; :meth:`claim` writes to it.

    What the run has otherwise than the one that it continues is in :attr:`changes`.

    Args:
        config: of the run.
        ranks: that share the prompts of a step; the first one checks the checkpoint.

    Raises:
        ConfigError: the folder holds another run, or the run to resume had other settings or models.
        CheckpointError: the checkpoint to resume from is none, or is damaged.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        ranks = ranks or Ranks()
        self.path = Path(config.output_dir)
        self.config = config
        self.checkpoint: Path | None = None
        self.changes: list[Change] = []
        self.models: Contents = {}
        self.before: Mapping[str, Any] | None = None
        self.processes = ranks.world_size
        self._held: IO[str] | None = None
        require_writable("output_dir", config.output_dir)
        _require_kinds(self.path)
        if (self.path / LOCK).exists():
            self._lock(fcntl.LOCK_SH).close()  # refuse what another process is writing before anything is loaded
        occupied = any((self.path / name).exists() for name in OWN)
        if config.resume_from_checkpoint is None:
            if occupied and self._has_trained():
                raise ConfigError(f"output_dir={config.output_dir!r} already holds a run; {self._way_out()}")
            return
        with ranks.agree():
            found = find_checkpoint(self.path, config.resume_from_checkpoint) if ranks.is_first else None
        self.checkpoint = ranks.gather(found)[0]
        if self.checkpoint is None:
            self._start_again(occupied)
            return
        origin = self.checkpoint.resolve().parent.parent
        if occupied and origin != self.path.resolve():
            raise ConfigError(
                f"output_dir={config.output_dir!r} holds another run than the checkpoint "
                f"{str(self.checkpoint)!r}; choose a new folder, or resume from a checkpoint of this one"
            )
        stored = self.state.get("settings")
        if stored is None and (origin / "config.yaml").is_file():  # of a checkpoint that an earlier version wrote
            stored = read_settings(origin / "config.yaml")
        self._read(stored)

    def look_at_models(self) -> None:
        """Read what lies in the model folders, which a checkpoint will say; called before they are loaded.

        Raises:
            ConfigError: one holds another model than in the run to resume.
        """
        self.models = contents_of_models(self.config)
        require_same_models(self.config, self.state.get("models", {}), self.models)

    def _read(self, stored: Mapping[str, Any] | None) -> None:
        """Take up the settings of the run before, and refuse what cannot follow on them.

        They are read like any configuration, so that a setting newer than that run has its default.
        """
        self.before = None if stored is None else to_mapping(from_mapping(TrainConfig, stored))
        self._compare()

    def settle(self, config: TrainConfig) -> int:
        """Take the settings as they are once the number of steps is known.

        Returns:
            The step after which the learning rate's schedule begins; where that is another one now, a line says so.

        Raises:
            ConfigError: the checkpoint is of a later step than the last one.
        """
        self.config, step = config, self.state.get("step", 0)
        if step > config.max_steps:
            raise ConfigError(
                f"max_steps={config.max_steps} is not possible: the checkpoint to continue from is of step {step}; "
                "give more steps, or name an earlier checkpoint with resume_from_checkpoint"
            )
        self._compare()
        begun: int = self.state.get("schedule_begin", 0)
        now: int = self.state.get("scheduler", {}).get("last_epoch", 0)
        return now if speak_of_schedule(self.changes, config, now) else begun

    def _compare(self) -> None:
        """Find what is otherwise than in the run before, and refuse what may not be."""
        config, before = self.config, self.state.get("prompts_per_step")
        self.changes = [] if self.before is None else changes(self.before, to_mapping(config))
        accept(self.changes, config, self.state.get("models", ()))
        now = config.prompts_per_step * self.processes
        if before in (None, now):
            return
        if not config.allow_changes:
            raise ConfigError(
                f"the run to resume had {before} prompts in a step, this one has {now} (per_device_train_batch_size="
                f"{config.per_device_train_batch_size} x gradient_accumulation_steps="
                f"{config.gradient_accumulation_steps} x {self.processes} processes); change the first two so that "
                f"their product with the processes is {before}, or go on with {now} by --allow_changes"
            )
        self.changes.append(Change("prompts_per_step", before, now, CHANGEABLE))

    def _start_again(self, occupied: bool) -> None:
        """A run that was interrupted before its first checkpoint, or never begun, starts from the beginning."""
        stored = self.path / "config.yaml"
        if (self.path / "final").exists() or (occupied and not stored.is_file()):
            raise ConfigError(
                f"output_dir={self.config.output_dir!r} has no checkpoint to continue from, and what it holds is not "
                "an interrupted run; choose another folder (save_steps writes checkpoints)"
            )
        if stored.is_file():
            self._read(read_settings(stored))
        logger.info("no checkpoint in %s yet: starting from the beginning", self.path / "checkpoints")

    def claim(self) -> None:
        """Make the folder this run's; called once everything that can be refused has been checked.

        Raises:
            ConfigError: another process is writing to it.
            WriteError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held = self._lock(fcntl.LOCK_EX)
        except OSError as error:
            raise WriteError(f"output_dir={self.config.output_dir!r} cannot be written ({error})") from error
        if self.config.resume_from_checkpoint is None and self._has_trained():  # since it was looked at first
            raise ConfigError(f"output_dir={self.config.output_dir!r} already holds a run; {self._way_out()}")
        try:
            self._prepare()
        except OSError as error:
            raise WriteError(f"output_dir={self.config.output_dir!r} cannot be written ({error})") from error

    def _prepare(self) -> None:
        if self.config.resume_from_checkpoint is None:  # what a run that trained nothing has left
            for name in ("config.yaml", "metrics.jsonl", CHANGES, NOTE):
                (self.path / name).unlink(missing_ok=True)
        self._leave_later()
        note_changes(self.path, self.state.get("step", 0), self.changes, keep="settings" not in self.state)
        if self._has_other_settings():
            text = dump_yaml(to_mapping(self.config))
            if PREFIX in text:
                text = NOT_HERE + text
            partial = self.path / "config.yaml.tmp"
            partial.write_text(text, "utf-8")
            partial.replace(self.path / "config.yaml")

    def _has_other_settings(self) -> bool:
        """Whether ``config.yaml`` is not that of this run, but of none or of one that was killed before a checkpoint.

        What a resumed run may have as it likes stays as the file has it.
        """
        file = self.path / "config.yaml"
        if self.changes or not file.exists():
            return True
        try:
            return bool(changes(read_settings(file), to_mapping(self.config)))
        except ConfigError:  # a file that is damaged: the checkpoint has said what counts
            return True

    def _leave_later(self) -> None:
        """Let nothing of a step after the one to continue from be taken for this run's.

        What an interrupted run wrote after its last checkpoint is removed: it is done again. Where later
        checkpoints exist, everything after the step is moved away as a whole, the newest first: a run that is
        killed meanwhile, or before its next checkpoint, continues from where it was sent back to.
        """
        step = self.state.get("step", -1)
        files = [f for name in LOGS for f in (self.path / name).glob("step_*") if f.suffix in (".jsonl", ".npz")]
        logs = [f for f in files if _step_of_log(f) > step]
        later = [c for c in list_checkpoints(self.path / "checkpoints") if step_of(c) > step]
        if self.checkpoint is None or not later:
            for file in logs:
                file.unlink()
            return
        number, target = 1, self.path / ABANDONED / f"after_step_{step}"
        while target.exists():
            number, target = number + 1, target.with_name(f"after_step_{step}.{number + 1}")
        target.mkdir(parents=True)
        for name in ("config.yaml", "metrics.jsonl", CHANGES):
            if (self.path / name).is_file():
                shutil.copy(self.path / name, target)
        ends = [self.path / name for name in ("final", "merged")]
        for path in (*reversed(later), *logs, *(end for end in ends if end.exists())):
            place = target / path.relative_to(self.path)
            place.parent.mkdir(exist_ok=True)
            shutil.move(path, place)
        logger.warning(
            "continuing from step %d: the checkpoints up to step %d, and what else was done after step %d, are now in "
            "%s; remove it when you do not need it",
            step, step_of(later[-1]), step, target,
        )  # fmt: skip

    def _lock(self, kind: int) -> IO[str]:
        """Lock the folder until the file is closed or this process has ended, however it ends."""
        try:
            file = open(self.path / LOCK, "a")  # noqa: SIM115 - closed by release()
        except OSError as error:
            raise WriteError(f"output_dir={self.config.output_dir!r} cannot be written ({error})") from error
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"output_dir={self.config.output_dir!r} is being written by another process; choose another folder, or "
                "end that process first"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): start no second run in it", self.path, error)
        return file

    def release(self) -> None:
        """Let another run have the folder."""
        if self._held is not None:
            self._held.close()

    def _way_out(self) -> str:
        if list_checkpoints(self.path / "checkpoints"):
            return "continue it with --resume_from_checkpoint latest, or choose another folder"
        return (
            "it has finished steps, but no checkpoint to continue from: choose another folder or remove this one "
            "(save_steps writes checkpoints)"
        )

    def _has_trained(self) -> bool:
        metrics = self.path / "metrics.jsonl"
        steps = [line["step"] for line in read_metrics(metrics, warn=False)] if metrics.is_file() else []
        return max(steps, default=0) > 0 or any(any(self.path.glob(pattern)) for pattern in TRAINED)

    @property
    def state(self) -> dict[str, Any]:
        """Return the state of the checkpoint to resume from; empty for a new run."""
        return {} if self.checkpoint is None else read_state(self.checkpoint)


def _step_of_log(file: Path) -> int:
    """The step that a file of a log belongs to; -1 for what no run has written."""
    number = file.stem.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


def require_writable(name: str, folder: str) -> None:
    """Raise ConfigError unless a folder can be made, or written to, where a setting wants it."""
    path = Path(folder).absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
        longest = os.pathconf(there if there.is_dir() else "/", "PC_NAME_MAX")
    except OSError as error:
        raise ConfigError(f"{name}={brief(folder)} is not possible: {error.strerror}") from None
    if there.is_symlink() and not there.exists():
        raise ConfigError(f"{name}={folder!r} is not possible: {str(there)!r} is a link to nothing")
    if not there.is_dir():
        raise ConfigError(f"{name}={folder!r} is not possible: {str(there)!r} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}={folder!r} is not possible: {str(there)!r} cannot be written to")
    if any(len(os.fsencode(part)) > longest for part in path.parts):
        raise ConfigError(f"{name}={brief(folder)} is not possible: a name in it is longer than {longest} bytes")


def _require_kinds(folder: Path) -> None:
    """Raise ConfigError where a file stands in the way of a folder that the run will write, or a folder of a file."""
    for name in (*LOGS, "checkpoints", "final", "merged", "bad_steps", "tensorboard", "wandb", ABANDONED):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ConfigError(f"output_dir={str(folder)!r} is not possible: {name!r} in it is no folder; remove it")
    for name in (LOCK, "config.yaml", "metrics.jsonl", CHANGES, NOTE):
        if (folder / name).exists() and not (folder / name).is_file():
            raise ConfigError(f"output_dir={str(folder)!r} is not possible: {name!r} in it is no file; remove it")


class InputFiles:
    """Notices when a file that a run was started from changes under it.

    The run goes on with what it has read, but can be resumed only with that.

    Args:
        paths: files; what is none (a hub data set, say) is passed over.
    """

    def __init__(self, paths: Sequence[str] = ()) -> None:
        self._seen = {path: _stamp(path) for path in paths}

    def check(self) -> None:
        """Warn about every file that has changed since the last time."""
        for path, before in self._seen.items():
            now = _stamp(path)
            if now != before:
                logger.warning(
                    "%s has %s while the run was using it: the run goes on with what it read at its start, but it "
                    "can be resumed only when the file is as it was",
                    path,
                    "changed" if now else "disappeared",
                )
                self._seen[path] = now


def _stamp(path: str) -> tuple[int, int] | None:
    file = Path(at_home(path))
    if not file.is_file():
        return None
    status = file.stat()
    return status.st_mtime_ns, status.st_size
