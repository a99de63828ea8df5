"""The best layouts of a recipe on a number of GPUs.

space    the layouts that are tried, and which of them the settings rule out
search   every layout's bound, the promising ones' forecast; the best of all, exactly
reasons  why what was left out was left out, and why a runner-up lost
report   tables, overrides, the file for Slurm
"""
