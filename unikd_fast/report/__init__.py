"""Tables of results; figures will stand beside them."""
