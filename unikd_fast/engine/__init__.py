"""The training engine, and the only importer of DeepSpeed."""
