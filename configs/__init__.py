"""One file per paper: `get_config(scale)` and, in the docstring, what the command printed."""
