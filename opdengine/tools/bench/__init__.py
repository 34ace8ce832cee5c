"""``opdengine bench``: benchmarks through the harnesses that keep them, with this project's sampler and sandbox."""
