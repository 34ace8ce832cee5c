"""The little house of :mod:`tiny.agents.house`, played by a real language model."""
