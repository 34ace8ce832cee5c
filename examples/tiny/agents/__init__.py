"""Tiny agents for the built-in house: their words, their models, and the demos of SAGE-OPD and OPAD."""
