"""How good clips are: fidelity to others, people's votes, VBench."""
