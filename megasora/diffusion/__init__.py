"""Diffusion (layer L1): flow matching, timesteps, conditions, guidance and layout-invariant randomness, as pure functions."""
