"""Export: the student of a run in files that other programs read."""
