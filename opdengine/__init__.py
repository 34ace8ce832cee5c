"""opdengine: on-policy distillation of language models from one or more teachers."""

__version__ = "0.1.0"
