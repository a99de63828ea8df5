"""Models (layer L2): the MMDiT on Megatron-core layers, and the encoders around it."""
