"""Methods that split caches: fewer entries for the same context."""
