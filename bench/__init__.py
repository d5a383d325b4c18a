"""Measuring: paired timings against the plain layers and torchvision, peak memory, and where they ran."""
