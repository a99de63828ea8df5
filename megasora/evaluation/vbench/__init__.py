"""VBench (Huang et al. 2024, arXiv 2311.17982): the clips it wants, and its results with the published weights beside published models'."""
