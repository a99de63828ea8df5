"""Decoding: the contract, the decoders that keep it, which one a run uses, and writing a clip."""
