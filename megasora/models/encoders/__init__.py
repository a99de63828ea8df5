"""Encoders around the MMDiT: the autoencoder and the text encoders, in their published classes and folder formats."""
