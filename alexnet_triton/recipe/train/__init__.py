"""A run of training: its settings, rule, loop, checkpoints and processes."""
