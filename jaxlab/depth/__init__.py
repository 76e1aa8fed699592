"""Methods that split a network's layers."""
