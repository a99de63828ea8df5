"""Curation (layer L2): probe files, find shots, score clips, filter by rules, report. Each stage reads a table and writes the next one."""
