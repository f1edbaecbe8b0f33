"""An update on a GPU as one CUDA graph.

A small network's update is some hundred kernels that take a processor far longer to launch than a GPU to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EAGER_CALLS = 3  # libraries and optimizer set themselves up in the first one

Batch = dict[str, Tensor]


class GraphedUpdate:
    """Calls an update a few times, then records it and only replays the record.

    It must do the same work for every batch of one shape, wait for nothing, and leave what it changes in place.
    """

    def __init__(self, update: Callable[[Batch], tuple[Any, ...]]) -> None:
        """`update` takes tensors on the GPU, by name, and gives results back."""
        self._update = update
        self._num_calls = 0

    def __call__(self, batch: Batch) -> tuple[Any, ...]:
        """One update; its results are the caller's."""
        with torch.cuda.device(next(iter(batch.values())).device):  # or the record is one of another GPU, empty
            return self._call(batch)

    def _call(self, batch: Batch) -> tuple[Any, ...]:
        self._num_calls += 1
        if self._num_calls <= _EAGER_CALLS:
            return self._apart(batch)
        if self._num_calls == _EAGER_CALLS + 1:
            self._record(batch)
        for name, kept in self._inputs.items():
            kept.copy_(batch[name])
        self._graph.replay()
        return tuple(result.clone() if isinstance(result, Tensor) else result for result in self._results)

    def _apart(self, batch: Batch) -> tuple[Any, ...]:
        """On a stream of its own, as recording asks for."""
        here, apart = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        apart.wait_stream(here)
        with torch.cuda.stream(apart):
            results = self._update(batch)
        here.wait_stream(apart)
        return results

    def _record(self, batch: Batch) -> None:
        self._inputs = {name: x.clone(memory_format=torch.contiguous_format) for name, x in batch.items()}
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            self._results = self._update(self._inputs)
