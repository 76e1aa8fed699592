"""Methods that split weights into parts: fewer bytes for the same network."""
