"""The trained model goes to the Hugging Face hub: whether it may is asked before the first step."""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import Any

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError, HubError
from opdengine.models.hub import kinds_of

logger = logging.getLogger(__name__)

LOGIN = "log in with 'hf auth login', or set HF_TOKEN to a token with the role 'write'"
REMEDY = "or leave push_to_hub out and push final/ later with 'hf upload'"


def open_repository(config: TrainConfig) -> str:
    """Make the repository where there is none, and prove that the model may be written to it.

    Returns:
        Its name, OWNER/NAME.

    Raises:
        ConfigError: there is no login, the hub cannot be reached, or the repository cannot be written.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to_hub is not possible offline: unset HF_HUB_OFFLINE, {REMEDY}")
    if get_token() is None:
        raise ConfigError(f"push_to_hub needs a login to the Hugging Face hub: {LOGIN}, {REMEDY}")
    hub, name = HfApi(), config.hub_model_id or Path(config.output_dir).resolve().name
    repository = name
    try:
        if "/" not in name:
            repository = f"{hub.whoami()['name']}/{name}"
        hub.create_repo(repository, private=config.hub_private_repo, exist_ok=True)
        hub.auth_check(repository, write=True)
        private = bool(hub.repo_info(repository).private)
    except Exception as error:  # huggingface_hub and its transport have classes of their own
        raise ConfigError(f"push_to_hub: {_problem(repository, error)}; {REMEDY}") from error
    if config.hub_private_repo is not None and private != config.hub_private_repo:
        is_now = "private" if private else "public"
        raise ConfigError(
            f"hub_private_repo={config.hub_private_repo} is not possible: {repository} exists and is {is_now}; change "
            "that on its page, or name another hub_model_id"
        )
    logger.info("the model will be pushed to %s (%s)", repository, "private" if private else "public")
    return repository


def push(folder: Path, repository: str, message: str) -> None:
    """Upload a model folder as one commit.

    Raises:
        HubError: says that nothing is lost, and how to do it again.
    """
    from huggingface_hub import HfApi

    try:
        done: Any = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:
        raise HubError(
            f"the model could not be pushed: {_problem(repository, error)}. The run is finished, its model is whole "
            f"in {str(folder)!r}; push it again with: hf upload {repository} {shlex.quote(str(folder))}"
        ) from error
    logger.info("pushed: %s", getattr(done, "commit_url", None) or repository)


def _problem(repository: str, error: Exception) -> str:
    kinds, status = kinds_of(error), getattr(getattr(error, "response", None), "status_code", None)
    if "LocalTokenNotFoundError" in kinds or status == 401:
        return f"the hub does not accept the login: {LOGIN}"
    if "HFValidationError" in kinds:
        return f"hub_model_id={repository!r} is no name that the hub could have (OWNER/NAME): correct it"
    if status in (403, 404):
        return (
            f"{repository} cannot be written with this login: take a token with the role 'write' of somebody who may, "
            "or name another hub_model_id"
        )
    said = " ".join(str(error).split()) or type(error).__name__
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"{where} did not take {repository} ({said})"
