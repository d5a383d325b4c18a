"""Runs that others have published, and what the model makes of them.

Facts are the network's kind, the processors, their number, the batch, the precision and the time; what a source
does not say, or could not be read in the source itself, `Run.assumed` names. Nothing of the model is fitted to
them. Reality should be slower than the model, which leaves out what makes it so: it is, by at most `FACTOR`. One
run alone is faster than the model of it with all its gradients sent, which they were not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from alexnet_triton.parallel.links import LINKS, inside, network
from alexnet_triton.parallel.scaling.machines import CARDS, Card, Cluster
from alexnet_triton.parallel.scaling.model import IMAGENET, Estimate, Job, estimate
from alexnet_triton.parallel.scaling.table import aligned, duration

FACTOR = 2.0
"""By how much published times are longer than the model's at most."""

HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Run:
    """A training run: what it was, and how long it took."""

    name: str
    source: str
    assumed: str
    seconds: float
    epochs: float
    layout: str
    gpus: int
    job: Job
    cluster: Cluster
    images: int = IMAGENET

    @property
    def model(self) -> Estimate:
        """A step of it."""
        return estimate(self.layout, self.gpus, self.job, self.cluster)

    @property
    def ratio(self) -> float:
        """The published time over the model's."""
        return self.seconds / self.model.seconds(self.epochs, self.images)


# --- 2012 and 2014 ----------------------------------------------------------------------------------------------------

TOWERS = Run(
    name="Krizhevsky 2012",
    source="Krizhevsky, Sutskever, Hinton, ImageNet Classification with Deep Convolutional Neural Networks, NeurIPS "
    "2012, section 5: 90 cycles through 1.2 million images in five to six days on two GTX 580 3GB, batch 128",
    assumed="PCI Express 2.0 x16 between the two; five and a half days",
    seconds=5.5 * DAY,
    epochs=90,
    layout="towers",
    gpus=2,
    job=Job("paper", batch=64, dtype="float32"),
    cluster=Cluster(CARDS["gtx580"], LINKS["pcie2"], network(10), gpus_per_machine=2),
    images=1_200_000,
)

HYBRID_HOURS = {1: 98.05, 2: 50.24, 4: 26.20, 8: 15.68}
"""Krizhevsky 2014, table 1, by GPUs: 98.05 hours on one, 6.25 times as fast on eight."""

HYBRID = tuple(
    Run(
        name="Krizhevsky 2014",
        source="Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv 1404.5997, section "
        "5 and table 1: 90 epochs on K20 GPUs of one machine, batch 128 for each",
        assumed="PCI Express 2.0 x16; the table as remembered: a second source confirms 98.05 h and 6.25, and its "
        "hours and speed-ups agree",
        seconds=hours * HOUR,
        epochs=90,
        layout="hybrid",
        gpus=gpus,
        job=Job("torchvision", batch=128, dtype="float32"),
        cluster=Cluster(CARDS["k20"], LINKS["pcie2"], network(10)),
    )
    for gpus, hours in HYBRID_HOURS.items()
)

# --- thousands of processors ------------------------------------------------------------------------------------------

FOUR_MINUTES = Run(
    name="Jia 2018",
    source="Jia et al., Highly Scalable Deep Learning Training System with Mixed-Precision: Training ImageNet in "
    "Four Minutes, arXiv 1807.11205, abstract and section 4.3: 95 epochs within 4 minutes on 1,024 Tesla P40, "
    "batch 64K, gradients in half precision, hierarchical all-reduce; 58.7 % top-1",
    assumed="8 GPUs a machine on PCI Express 3.0 x16, 100 Gb/s a machine (remembered); the paper's network without "
    "its batch normalisation",
    seconds=240,
    epochs=95,
    layout="data",
    gpus=1024,
    job=Job("caffe", batch=64, dtype="float16"),
    cluster=Cluster(CARDS["p40"], LINKS["pcie3"], network(100)),
)

SPARSE_SECONDS, SPARSE_SPEEDUP, SPARSE_GPUS = 90.0, 410.2, 512
"""Sun et al. 2019, abstract."""


def sparse(gradient_share: float) -> Run:
    """The run of Sun et al. 2019, were so much of the gradients' bytes sent.

    How fast one of its GPUs is follows from its own figures: the images of 95 epochs in 90 seconds, over 410.2.
    """
    return Run(
        name=f"Sun 2019, {gradient_share:.0%} of the gradients sent",
        source="Sun et al., Optimizing Network Performance for Distributed DNN Training on GPU Clusters: "
        "ImageNet/AlexNet Training in 1.5 Minutes, arXiv 1902.06855, abstract: 95 epochs in 1.5 minutes on 512 "
        "GPUs over 56 Gb/s, 410.2 times one GPU's speed, mixed precision, only important chunks of the gradients "
        "sent",
        assumed="Volta GPUs, 8 a machine on PCI Express 3.0 x16, batch 128 for each (remembered); how much was sent",
        seconds=SPARSE_SECONDS,
        epochs=95,
        layout="data",
        gpus=SPARSE_GPUS,
        job=Job(
            "caffe",
            batch=128,
            dtype="float16",
            gradient_share=gradient_share,
            one_gpu=95 * IMAGENET / SPARSE_SECONDS / SPARSE_SPEEDUP,
        ),
        cluster=Cluster(CARDS["v100"], LINKS["pcie3"], network(56)),
    )


ELEVEN_MINUTES = Run(
    name="You 2018",
    source="You et al., ImageNet Training in Minutes, arXiv 1709.05011 version 5, abstract: 100 epochs in 11 minutes "
    "on 1,024 CPUs, batches of 32K with LARS",
    assumed="Xeon Platinum 8160 (named in the paper's journal version) of 3.2 TFLOP/s and 128 GB/s, two a machine, "
    "100 Gb/s a machine (remembered); float32",
    seconds=11 * 60,
    epochs=100,
    layout="data",
    gpus=1024,
    job=Job("caffe", batch=32, dtype="float32"),
    cluster=Cluster(Card("Xeon Platinum 8160", 3.2e12, 128e9), inside("UPI", 41.6), network(100), gpus_per_machine=2),
)

HELD_AGAINST = (TOWERS, *HYBRID, FOUR_MINUTES, ELEVEN_MINUTES)
"""Of which everything that the model needs is known or assumed: each took 1 to `FACTOR` times as long."""

RUNS = (*HELD_AGAINST, sparse(1.0), sparse(0.1))


def compared(runs: Iterable[Run] = RUNS) -> str:
    """The runs as a table: published time, the model's, and the first over the second."""
    rows = [("run", "processors", "layout", "epochs", "published", "model", "ratio")]
    for run in runs:
        modelled = run.model.seconds(run.epochs, run.images)
        processors = f"{run.gpus:,} x {run.cluster.card.name}"
        times = duration(run.seconds), duration(modelled), f"{run.ratio:.2f}"
        rows.append((run.name, processors, run.layout, f"{run.epochs:g}", *times))
    return aligned(rows, words=3)
