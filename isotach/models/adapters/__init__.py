"""Foreign checkpoints as our models: one file per format, which is all that knows its names."""
