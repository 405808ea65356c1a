"""The cells of the papers' tables: run, or resumed, several at a time, and written down beside the printed figures."""
