"""Reading media files with PyAV alone: what training data and curation must agree on."""
