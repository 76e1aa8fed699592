"""Training language models: Muon and AdamW groups, one loop, checkpoints that resume exactly."""
