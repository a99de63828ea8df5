"""The Open-Sora 2.0 MMDiT: one forward for every layout."""
