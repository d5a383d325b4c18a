"""The network over several devices in stages, microbatches one behind the other."""

from alexnet_triton.parallel.pipeline.costs import auto_cut
from alexnet_triton.parallel.pipeline.local import LocalPipeline
from alexnet_triton.parallel.pipeline.measuring import measure
from alexnet_triton.parallel.pipeline.stages import Stage, load_whole_state_dict, split, whole_state_dict
from alexnet_triton.parallel.pipeline.work import NEUTRAL, Table

__all__ = [
    "split",
    "Stage",
    "whole_state_dict",
    "load_whole_state_dict",
    "LocalPipeline",
    "auto_cut",
    "measure",
    "Table",
    "NEUTRAL",
]
