"""Inference (layer L3): one forward for parity checks, and sampling."""
