"""Measured sweeps: every point of a grid is a normal training run; what they wrote becomes one file, a report, a comparison.

grid        the file that declares a study, and the points it stands for
launch      a point on this machine: torchrun, its log, its end
slurm       a point as a job of a Slurm cluster
outcome     what became of a run of a point
run         the loop: what is left to do, in which order; a repeated command goes on
collect     from the steps of runs to medians and quartiles
results     the file results.json
machine     where and with what it was measured
predicted   what a prediction holds, and the names of a step's parts
efficiency  strong and weak scaling
report      tables, TensorBoard and the page; plots and page draw it
compare     two studies side by side: a gate against regressions
trace/      traces of torch.profiler as a table of a step's parts
calibrate/  what this machine's kernels and collectives reach, as a hardware profile
"""
