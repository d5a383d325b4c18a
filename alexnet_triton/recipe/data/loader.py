"""Images read ahead of the computation, by threads, and copied to the device behind it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from alexnet_triton.recipe.data.sets import ImageSet


def readers() -> int:
    """Threads that read where nothing else is said: one a core, eight at most."""
    return min(8, os.cpu_count() or 1)


class Loader:
    """Reads batches of a set of images before they are asked for.

    Threads do it, not processes: reading, checking and decoding an image leave Python's lock alone for most of their
    time, and nothing is copied from process to process. On a GPU a batch passes through pinned memory, and its copy
    runs on a stream of its own behind the work on the batch before.

    Args:
        data: the images.
        workers: threads that read, each a batch at a time; 0: the caller reads.
        device: where batches go.

    Attributes:
        waited: seconds that callers have waited for images so far.
    """

    def __init__(self, data: ImageSet, workers: int, device: torch.device) -> None:
        self.data, self.workers, self.device = data, workers, device
        self.waited = 0.0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each part, in order.

        Args:
            parts: indices of the images of each batch.

        Yields:
            (B, 3, S, S), uint8, on the device.

        Raises:
            DataError: an image cannot be read.
        """
        if self._copies is None:
            for images in self._read_ahead(iter(parts)):
                yield images.to(self.device)
            return
        ahead: tuple[Tensor, torch.cuda.Event] | None = None
        for images in self._read_ahead(iter(parts)):
            with torch.cuda.stream(self._copies):
                copied = images.to(self.device, non_blocking=True)
                following = copied, self._copies.record_event()
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = following
        if ahead is not None:
            yield self._arrived(*ahead)

    def _read_ahead(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        if self.workers == 0:
            for part in parts:
                start = time.perf_counter()
                images = self._read(part)
                self.waited += time.perf_counter() - start
                yield images
            return
        pending: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(self.workers, "alexnet_triton_reads") as pool:
            try:
                for part in parts:
                    pending.append(pool.submit(self._read, part))
                    if len(pending) > self.workers + 1:
                        yield self._next(pending)
                while pending:
                    yield self._next(pending)
            finally:
                for future in pending:
                    future.cancel()

    def _next(self, pending: deque[Future[Tensor]]) -> Tensor:
        start = time.perf_counter()
        images = pending.popleft().result()
        self.waited += time.perf_counter() - start
        return images

    def _read(self, part: Tensor) -> Tensor:
        images = self.data.read(part)
        return images if self._copies is None else images.pin_memory()

    def _arrived(self, copied: Tensor, event: torch.cuda.Event) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        copied.record_stream(current)
        return copied
