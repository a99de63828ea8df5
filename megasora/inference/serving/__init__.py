"""`megasora serve`: a page that draws clips, one at a time."""
