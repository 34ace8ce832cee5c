"""Errors that end a run which can go on later: nothing is wrong with what was learned so far."""

from __future__ import annotations


class ServiceError(RuntimeError):
    """A process or server that the run depends on failed; the message names the remedy."""


class VLLMMissingError(ImportError):
    """vLLM was asked for and is not installed."""
