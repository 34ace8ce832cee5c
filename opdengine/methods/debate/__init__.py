"""The debate of MAD-OPD: its rounds, its prompts, and the contexts that come of it."""
