"""Job files for Slurm: what a job asks for (`job.py`), its settings as flags (`flags.py`), and the text of the file (`template.py`).

Pure: from data to text. Nothing here talks to a cluster, and nothing of megasora but its settings is known.
"""
