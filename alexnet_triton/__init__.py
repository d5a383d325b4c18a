"""AlexNet (Krizhevsky, Sutskever, Hinton 2012), the whole system: a drop-in network on fused ops."""

from alexnet_triton import ops
from alexnet_triton.backend import use_backend
from alexnet_triton.fusion import FusedSequential, fuse, unfuse
from alexnet_triton.model import AlexNet, alexnet
from alexnet_triton.variants import VARIANTS
from alexnet_triton.weights import read_state_dict

__version__ = "0.2.0"

__all__ = [
    "AlexNet",
    "alexnet",
    "VARIANTS",
    "read_state_dict",
    "fuse",
    "unfuse",
    "FusedSequential",
    "use_backend",
    "ops",
    "__version__",
]
