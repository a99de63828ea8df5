"""How good clips are: fidelity against other clips, people's choices, and VBench. Nothing in it makes a clip; who does is passed in."""
