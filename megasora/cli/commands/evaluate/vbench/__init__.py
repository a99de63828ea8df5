"""VBench: the clips it wants, and its results beside published ones."""
