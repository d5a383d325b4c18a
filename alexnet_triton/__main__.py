"""`python -m alexnet_triton` is the command line `alexnet-triton`."""

import sys

from alexnet_triton.cli import main

sys.exit(main())
