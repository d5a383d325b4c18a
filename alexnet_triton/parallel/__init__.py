"""Several processes, or several GPUs of one process, that share a network."""
