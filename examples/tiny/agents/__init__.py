"""Tiny agents in a little house: the world, their words, their models, and the demos of SAGE-OPD and OPAD."""
