"""Methods that split tensors and matrices into factors and parts."""
