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

__all__ = [
    "FAILURES",
    "Broken",
    "Environment",
    "HasExpert",
    "InfrastructureError",
    "Observation",
    "Step",
    "Task",
]
