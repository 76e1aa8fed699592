"""What every family shares: linear recurrences, Newton over a chain of blocks, meshes, input checks."""
