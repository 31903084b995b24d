"""Scripts for the Python of a peer's virtualenv; nothing here imports them."""
