"""The protocol as an executable model, explored exhaustively; see `__main__.py` for the long form."""
