"""`python -m alexnet_triton.bench` is `alexnet-triton bench`."""

import sys

from alexnet_triton.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
