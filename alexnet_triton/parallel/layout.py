"""How the processes of a run hold the network: copies, stages of a pipeline, towers, or 2014's hybrid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alexnet_triton.model import AlexNet
from alexnet_triton.parallel.engine import Engine
from alexnet_triton.parallel.pipeline import schedules
from alexnet_triton.parallel.processes.world import World
from alexnet_triton.parallel.replicas import Replicas

TOWERS = 2
"""Of the network of 2012."""


@dataclass(frozen=True)
class Layout:
    """How the processes of a run hold the network.

    By default each has a copy, and a part of every batch (data parallel). A pipeline or towers may be there in several
    copies too, in a multiple of their processes; a hybrid takes all.
    """

    pipeline: int = 1
    """Stages that the network is cut into, one a process."""
    microbatches: int = 8
    """Parts of a step's images that go through the stages one behind the other."""
    schedule: str = "1f1b"
    """Order of the stages' work, of `pipeline.schedules.SCHEDULES`."""
    cut: Sequence[str] = ()
    """Names of the layers that begin a stage, but for the first; none lets them be chosen."""
    towers: bool = False
    """Two processes with half of every layer each, as in 2012."""
    hybrid: bool = False
    """Convolutions in every process, fully connected layers shared out among them (Krizhevsky 2014)."""

    def __post_init__(self) -> None:
        chosen = [name for name, on in self._kinds().items() if on]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are different ways to share a network: choose one")
        if self.pipeline < 1 or self.microbatches < 1:
            raise ValueError(
                f"a pipeline has at least 1 stage and 1 microbatch, got {self.pipeline} and {self.microbatches}"
            )
        if self.pipeline > 1:
            schedules.check(self.schedule, self.pipeline, self.microbatches)
        if self.cut and self.pipeline == 1:
            raise ValueError("--cut says where a pipeline's stages begin: add --pipeline STAGES")

    def _kinds(self) -> dict[str, bool]:
        return {"--pipeline": self.pipeline > 1, "--towers": self.towers, "--hybrid": self.hybrid}

    @property
    def per_replica(self) -> int:
        """Processes that hold one copy of the network."""
        return TOWERS if self.towers else self.pipeline

    def engine(self, model: AlexNet, world: World, batch: int, image_size: int, compiled: bool = False) -> Engine:
        """Share the network out among the processes.

        Args:
            model: the whole network, the same in every process; what this one does not hold leaves it.
            world: the processes, `per_replica` of them to a copy.
            batch: images of a step, of one copy.
            image_size: their side, in pixels.
            compiled: compile the network with `torch.compile`, where each process has all of it.

        Raises:
            ValueError: the network cannot be shared like this.
        """
        shared = [name for name, on in self._kinds().items() if on]
        if not shared:
            return Replicas(model, world, compiled)
        if compiled:
            raise ValueError(f"--compile takes the network whole, and {shared[0]} shares it out: leave one of them out")
        if self.pipeline > 1:
            from alexnet_triton.parallel.pipeline.engine import PipelineEngine

            return PipelineEngine(
                model,
                world,
                batch=batch,
                image_size=image_size,
                microbatches=self.microbatches,
                schedule=self.schedule,
                at=self.cut or "auto",
            )
        if world.size == 1:
            raise ValueError(
                "--hybrid shares the network out among processes, and this one is alone: start several, as in torchrun "
                "--nproc-per-node 2 -m alexnet_triton train"
            )
        from alexnet_triton.parallel.shared import HybridEngine, TowersEngine

        return TowersEngine(model, world) if self.towers else HybridEngine(model, world)
