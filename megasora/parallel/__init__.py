"""Parallelism (layer L1): topology, process groups, packs over ranks, context attention, pipeline messages, the CPU backend."""
