"""Checkpoints and weight files (layer L2): transactions on disk, and the names other systems use."""
