"""Performance arithmetic (layer L1): FLOPs, peaks, utilisation and the bytes of collectives, as pure functions."""
