"""Text to batches: corpora (tfds builders), byte-level BPE, BOS-aligned packing, generated recall tasks."""
