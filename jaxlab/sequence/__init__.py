"""Methods that split sequences and training data."""
