"""What this machine's kernels and collectives reach, measured, as a hardware profile.

timing       medians of repeats on a CPU or a GPU
kernels      products, attention, memory, Adam, launches
collectives  bandwidth and latency of the world's ranks, under torchrun
profile      all of it as a `Hardware`
"""
