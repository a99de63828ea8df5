"""Job files for a Slurm cluster."""
