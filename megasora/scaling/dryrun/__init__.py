"""The dry run: one rank of any job does a real training step on fake tensors, and everything it does is written down.

world        a world of any size in one process: fake process groups
stand_ins    what takes a GPU's place, and what is said about it
batches      the rank's packs of a step, as fake tensors
recorder     sees every operation; `place` knows where in the step it happens
products     FLOPs of matrix products and attention, by kind
messages     bytes of collectives, by group
timeline     bytes allocated, over the step
expected     the same from closed forms
run          one rank: `dry_run`
classes      which ranks of a job do the same; `jobs` runs one of each
report       tables
"""
