"""unikd_fast."""
