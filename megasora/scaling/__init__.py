"""Know before you rent (layer L4): what a run will need and how fast it will be, on GPUs that nobody has rented yet.

workload    which packs a step holds, from a manifest or from the recipe's own buckets
dryrun/     one rank of any job, run for real on fake tensors: FLOPs, collectives, memory over time
forecast/   the time of a step on given hardware, event by event
plan/       the best layouts of a recipe on a number of GPUs
study/      measured sweeps: declare, run, collect, report, compare, trace, calibrate
"""
