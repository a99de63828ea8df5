"""Ranks that die, hang and come back: real processes on gloo."""
