"""Environments in which a student acts over many turns."""

from opdengine.environments.protocol import (
    FAILURES,
    Broken,
    Environment,
    HasExpert,
    InfrastructureError,
    Observation,
    Step,
    Task,
)
from opdengine.environments.registry import ENVIRONMENTS, load_environment

__all__ = [
    "ENVIRONMENTS",
    "FAILURES",
    "Broken",
    "Environment",
    "HasExpert",
    "InfrastructureError",
    "Observation",
    "Step",
    "Task",
    "load_environment",
]
