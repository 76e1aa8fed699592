"""Methods that split the context: attention to some of it, chosen block by block or chunk by chunk."""
