"""`python -m alexnet_triton` is the command line `alexnet-triton`."""

import sys

from alexnet_triton.cli import main

if __name__ == "__main__":  # not where a process of a pool imports it
    sys.exit(main())
