"""Sets of images: files, packed datasets, and what reads them ahead of the computation."""
