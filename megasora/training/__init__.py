"""Training (layer L3): the wiring of model, data, optimizer and checkpoints; the one place that knows all parts."""
