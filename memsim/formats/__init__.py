"""What others wrote: configurations of models and runs, headers of checkpoints."""
