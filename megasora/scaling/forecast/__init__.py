"""The time of a step on given hardware, before any GPU is there: arithmetic and an event-by-event pipeline; nothing is computed or sent.

cost        seconds by category, which add up
block       one block, one pack: products, attention, memory-bound kernels, collectives
chunk       a pipeline chunk's forward and backward pass of a pack
pipeline    Megatron's schedules, event by event, with unequal stages and packs
step        a whole step: pipeline, gradients, optimizer, clips
run         a whole run: steps, checkpoints, failures, hours, money
"""
