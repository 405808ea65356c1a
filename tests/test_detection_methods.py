"""Every method that a detector can be distilled by trains a step; the others say why they cannot."""
