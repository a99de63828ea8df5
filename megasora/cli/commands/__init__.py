"""The commands, one file each; see `cli/registry.py`."""
