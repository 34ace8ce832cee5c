"""From a configuration to tasks and running environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opdengine.data.prompts import DataError, PromptSet
from opdengine.environments.registry import ENVIRONMENTS, POOL_OPTIONS, check_options, load_environment
from opdengine.plugins import explain
from opdengine.types import Prompt
from opdengine.workers.printing import brief

if TYPE_CHECKING:
    from opdengine.config.sections import EnvironmentConfig
    from opdengine.config.train import TrainConfig
    from opdengine.environments.episodes import Episodes


def load_tasks(config: EnvironmentConfig, split: str) -> PromptSet:
    """The tasks of a split as prompts: ``extra["task"]`` is the task, the routing key its type.

    Raises:
        DataError: an option is unknown, the split has no tasks, they cannot be read, a package is missing, or an
            id is missing or occurs twice.
    """
    options = {name: value for name, value in config.options.items() if name not in POOL_OPTIONS}
    try:
        environment = load_environment(config.name)
        check_options(config.name, environment, options)
    except (ValueError, ImportError) as error:
        raise DataError(str(error)) from error
    try:
        tasks = environment.tasks(split, **options)
    except (Exception, SystemExit) as error:
        ours = config.name in ENVIRONMENTS
        if ours and not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            raise
        told = str(error) if ours else explain(error)
        raise DataError(f"environment {config.name!r}: no tasks of split {split!r}: {told}") from error
    if not isinstance(tasks, Sequence) or not all(isinstance(task, Mapping) for task in tasks):
        raise DataError(
            f"environment {config.name!r}: tasks({split!r}) gave {brief(tasks)}, which is no list of mappings with 'id'"
        )
    if not tasks:
        raise DataError(f"environment {config.name!r} has no tasks in split {split!r}; check its options")
    prompts, seen = [], set[str]()
    for number, task in enumerate(tasks, start=1):
        name = task.get("id")
        if name is None or str(name) in seen:
            problem = "has no id" if name is None else f"has the id {name!r} of another one"
            raise DataError(f"environment {config.name!r}, split {split!r}: task {number} {problem}")
        seen.add(str(name))
        prompts.append(Prompt(str(name), (), key=str(task.get("type") or ""), extra={"task": task}))
    return PromptSet(tuple(prompts), {})


def held_out_tasks(config: EnvironmentConfig) -> dict[str, Sequence[Prompt]]:
    """The tasks of every split to evaluate on."""
    return {split: load_tasks(config, split).prompts[: config.eval_max_tasks] for split in config.eval_splits}


def open_episodes(config: TrainConfig, tokenizer: Any, window: int | None) -> Episodes:
    """Start the environments' processes.

    Args:
        config: of the run.
        tokenizer: the student's.
        window: of the student, in tokens.
    """
    from opdengine.environments.actions import with_tool_calls
    from opdengine.environments.episodes import Episodes
    from opdengine.environments.pool import EnvironmentPool
    from opdengine.models.rendering import thought_opening

    c = config.environment
    limits = [limit for limit in (c.max_trajectory_tokens, window) if limit is not None]
    pool = EnvironmentPool(
        c.name,
        c.options,
        c.num_environments,
        step_timeout=c.step_timeout,
        reset_timeout=c.reset_timeout,
        max_observation_chars=c.max_observation_chars,
    )
    return Episodes(
        pool=pool,
        tokenizer=tokenizer,
        template_kwargs=config.chat_template_kwargs,
        max_turns=c.max_turns,
        max_trajectory_tokens=min(limits, default=1 << 30),
        parse=with_tool_calls,
        opening=thought_opening(tokenizer, config.chat_template_kwargs),
    )
