"""The student's rollouts from vLLM, whose weights the trainer replaces.

:mod:`~opdengine.rollout.vllm.sampler` is the one sampler: checks, seeds, weight files, names of versions, ranks. It
talks to an :class:`~opdengine.rollout.vllm.engine.Engine`, of which there are two. A child process
(:mod:`~opdengine.rollout.vllm.child`, :mod:`~opdengine.rollout.vllm.worker`) computes on this rank's devices for this
rank alone. A server (:mod:`~opdengine.rollout.vllm.remote`) is vLLM's own, asked over HTTP: by ranks that share an
engine, which start it themselves, or wherever ``opdengine vllm-serve`` (:mod:`~opdengine.rollout.vllm.serve`) runs.

A child is no server because HTTP is dear where nothing needs it: on two cores it took twice the processor time per
token, three times that of the start and 1.2 GB more memory, for the same tokens.
"""
