"""Errors of the whole package; each message names the remedy."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the value and the remedy."""


class ModelFileError(ValueError):
    """A model whose files are damaged, or do not hold its weights; the message names file or tensors."""


class ServiceError(RuntimeError):
    """A process or server that the run depends on failed; what was learned so far is whole."""


class NothingTrainedError(RuntimeError):
    """Steps in which no weight can move: a run that goes on so must not end as if it had trained."""


class VLLMMissingError(ImportError):
    """vLLM was asked for and is not installed."""


class WriteError(RuntimeError):
    """The run's files cannot be written: the disk is full, say. What was written before is whole."""


class HubError(RuntimeError):
    """The finished model could not be pushed; it is whole in its folder."""


class ProbeError(RuntimeError):
    """A sanity check failed: going on would train on something wrong."""
