"""What differs between tasks: what an evaluation counts, its figures, and which evaluation is the best."""
