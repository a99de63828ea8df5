"""Configuration: what a run is, as frozen data. Standard library and PyYAML only (layer L0)."""
