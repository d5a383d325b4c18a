"""`python -m alexnet_triton.bench` is `alexnet-triton bench`."""

import sys

from alexnet_triton.cli import main

if __name__ == "__main__":  # not where a process of a pool imports it
    sys.exit(main(["bench", *sys.argv[1:]]))
