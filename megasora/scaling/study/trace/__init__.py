"""Traces of torch.profiler as a table: where each step's time went on each rank.

file       a trace file as intervals: steps, places, kernels, collectives
breakdown  intervals as seconds by part
summary    all ranks of a run, and their mean
"""
