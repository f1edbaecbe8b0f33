"""The workers of a collection: Ray actors that play shards; a lost one is replaced and its shard played again."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import ray

from pipeline.errors import UserError
from pipeline.lanes import Lane, LaneResult, LaneWriter, play_lanes
from pipeline.policies import BehaviourFactory
from pipeline.schema import Preprocess

MAX_TRIES = 3  # of a shard, and of a worker's start

log = logging.getLogger(__name__)


@dataclass
class _Try:
    """A shard being played: by which worker, and the rows that it has written."""

    shard: list[Lane]
    worker: int
    rows: int = 0


class Crew:
    """Collecting workers, one CPU each, under way until `stop`.

    A shard gives the same bytes whoever plays it, so that nothing but time is lost with a worker.

    Attributes:
        rows_per_worker: Rows that count, by worker.
    """

    def __init__(
        self, place: tuple[pafs.FileSystem, str], preprocess: Preprocess, num_workers: int, *, with_ram: bool
    ) -> None:
        """Starts the workers, which write to a path in a file system."""
        self._arguments = (place, preprocess, with_ram)
        self._workers: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        self._playing: dict[Any, _Try] = {}
        self._losses: Counter[Any] = Counter()
        self._idle = deque[int]()
        self._waiting = deque[list[Lane]]()
        self.rows_per_worker = {str(index): 0 for index in range(num_workers)}
        for index in range(num_workers):
            self._start(index)

    def wait_until_ready(self) -> None:
        """Waits for all workers to have started; one that is lost on the way is replaced.

        Raises:
            UserError: The same one has been lost several times.
        """
        while self._starting:
            self._look_at_next([], lambda rows: None)

    def play(
        self, shards: list[list[Lane]], behaviour: BehaviourFactory, on_rows: Callable[[int], None]
    ) -> list[LaneResult]:
        """Plays all shards; the results in order of their lanes.

        Args:
            shards: What to play.
            behaviour: Makes the policy that plays.
            on_rows: Called with the number of rows just written; negative where they were lost with their worker.

        Raises:
            UserError: The same shard has been lost several times, or a worker does not start.
        """
        self._waiting.extend(shards)
        results, num_lanes = list[LaneResult](), sum(map(len, shards))
        while len(results) < num_lanes:
            while self._waiting and self._idle:
                worker, shard = self._idle.popleft(), self._waiting.popleft()
                self._playing[self._workers[worker].run.remote(shard, behaviour)] = _Try(shard, worker)
            self._look_at_next(results, on_rows)
        return sorted(results, key=lambda result: result.lane.index)

    def stop(self) -> None:
        """Ends all workers at once."""
        with contextlib.suppress(Exception):  # where Ray itself has gone, they have too
            for worker in self._workers.values():
                ray.kill(worker)

    def _start(self, index: int) -> None:
        self._workers[index] = _Collector.remote(*self._arguments)  # type: ignore[attr-defined]
        self._starting[self._workers[index].ready.remote()] = index

    def _look_at_next(self, results: list[LaneResult], on_rows: Callable[[int], None]) -> None:
        """Waits for the next thing that a worker has, or for the next loss of one."""
        (ref,), _ = ray.wait([*self._starting, *self._playing], num_returns=1)
        try:
            self._look(ref, results, on_rows)
        except ray.exceptions.RayActorError as error:
            self._replace(ref, error, on_rows)

    def _look(self, ref: Any, results: list[LaneResult], on_rows: Callable[[int], None]) -> None:
        """Takes what a worker has: that it has started, that it has written rows, or its results."""
        if ref in self._starting:
            ray.get(ref)
            self._idle.append(self._starting.pop(ref))
            return
        tried = self._playing[ref]
        try:
            item = ray.get(next(ref))
        except StopIteration:
            del self._playing[ref]
            self._idle.append(tried.worker)
            return
        if isinstance(item, int):
            tried.rows += item
            on_rows(item)
        else:
            results.extend(item)  # when the last are here nothing more is looked at
            self.rows_per_worker[str(tried.worker)] += tried.rows

    def _replace(self, ref: Any, error: Exception, on_rows: Callable[[int], None]) -> None:
        tried = self._playing.pop(ref, None)
        index = tried.worker if tried else self._starting.pop(ref)
        what = f"collecting worker {index} is lost ({type(error).__name__})"
        task = tried.shard[0].index if tried else f"start of {index}"
        self._losses[task] += 1
        if self._losses[task] == MAX_TRIES:
            raise UserError(f"{what}, {MAX_TRIES} times at the same task; Ray's logs say why") from error
        log.warning("%s; %s", what, f"its {tried.rows} rows are played again" if tried else "it is started again")
        if tried:
            on_rows(-tried.rows)
            self._waiting.appendleft(tried.shard)
        self._start(index)


@ray.remote(num_cpus=1)
class _Collector:
    """A worker: plays the lanes of a shard and writes their files."""

    def __init__(self, place: tuple[pafs.FileSystem, str], preprocess: Preprocess, with_ram: bool) -> None:
        self._filesystem, self._root = place
        self._preprocess = preprocess
        self._with_ram = with_ram
        pa.array(
            [0]
        )  # pyarrow imports pandas at its first array, a third of a second: better now than in the first shard

    def ready(self) -> bool:
        """Answers once the process has started."""
        return True

    @ray.method(num_returns="streaming")
    def run(self, lanes: list[Lane], behaviour: BehaviourFactory) -> Iterator[int | list[LaneResult]]:
        """Yields numbers of written rows as they come, and at last the results of the lanes."""
        writers = [LaneWriter(self._filesystem, self._root, self._preprocess, lane, self._with_ram) for lane in lanes]
        yield from play_lanes(self._preprocess, lanes, writers, behaviour, with_ram=self._with_ram)
        yield [writer.close() for writer in writers]
