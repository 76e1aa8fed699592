"""Methods that split tensors and matrices."""
