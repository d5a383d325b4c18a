"""The processes of a run, and which of them has died."""
