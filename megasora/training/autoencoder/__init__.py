"""`megasora train-ae`: training of autoencoders of clips, on the loop, checkpoints and records of `megasora train`."""
