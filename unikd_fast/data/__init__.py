"""Data sets, the order in which a run visits them, the views it takes, and the loaders that make batches of both."""
