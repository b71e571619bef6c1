"""Reading checkpoints: containers, symbolic pickles, verdicts, and finding the state dict. Writes nothing."""
