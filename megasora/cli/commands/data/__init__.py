"""Raw clips to a training set: probe, shots, score, filter, report, encode; pack-stats."""
