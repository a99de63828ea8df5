"""Scaling studies: measure a grid of layouts, report it, compare two; traces, and this machine as a hardware profile."""
