"""Runs programs that nobody has read: no network, no files, no other processes, limits on everything else."""
