"""The student of a run in files that other programs read."""
