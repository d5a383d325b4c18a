"""What training costs on many GPUs of many machines: a model of a step, layer by layer, held against published runs.

A step is forward, backward, what communication backward does not hide, and the update; where images cannot be read
as fast, it takes as long as reading:

    step = max(computing + waiting, bytes of a machine's images / bytes that it reads a second)

- *Computing.* A product takes its multiply-adds (`info.layer_table`) at the rate of products that is reached, or
  its bytes at that of memory, whichever is longer; a layer's backward is two of them, the first layer's one.
  Pooling and normalisation move bytes. ReLU and dropout are part of their neighbours. An update moves
  `UPDATE_BYTES` for each parameter.
- *All-reduce* of B bytes over n places in a ring: 2 (n - 1) / n * B / rate + 2 (n - 1) latencies (Patarasuk and
  Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). Of several machines the
  fastest of one ring through all GPUs; rings inside the machines and one between them; and the same with trees
  between them, 2 B / rate + 2 log2(machines) latencies. Jia et al. 2018 (section 4.3) and NCCL choose among the
  like.
- *Hiding.* Gradients travel while backward goes on, in buckets, in the order in which it completes them: those of
  the fully connected layers, 94 % of the bytes, come first. Waiting is for what is under way when backward has
  ended.

Layouts are those of `alexnet-triton train`: `data` (whole copies), `pipeline` (copies of two stages), `hybrid`
(Krizhevsky 2014: copies of the convolutions, fully connected layers split) and `towers` (2012). All get as many
images a GPU.

What the model leaves out makes things slower than it says: the host's work between launches, processes that wait
for one another's hiccups, other traffic, batch normalisation, evaluation. `published` says by how much, of runs
that others have measured, with one set of assumptions for all: see `machines`.
"""

from alexnet_triton.parallel.links import LINKS, Link, network
from alexnet_triton.parallel.scaling.machines import CARDS, Card, Cluster
from alexnet_triton.parallel.scaling.model import IMAGENET, LAYOUTS, Estimate, Job, alone, estimate

__all__ = [
    "CARDS",
    "IMAGENET",
    "LAYOUTS",
    "LINKS",
    "Card",
    "Cluster",
    "Estimate",
    "Job",
    "Link",
    "alone",
    "estimate",
    "network",
]
