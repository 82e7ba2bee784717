"""Asynchronous copies from global to shared memory, and the groups that each thread commits and waits for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx.memory import SharedMemory
from ptx.operands import Array


@dataclass
class _Batch:
    """The copies that one instruction started."""

    lanes: Array
    rows: Array  # of shared memory
    values: Array  # bytes [lanes, size]
    groups: Array  # of each lane's


class Copies:
    """They arrive as late as they may: when their thread waits for their group."""

    def __init__(self, threads: int, blocks: Array, shared: SharedMemory) -> None:
        self._blocks, self._shared = blocks, shared
        self._committed = np.zeros(threads, np.int64)  # groups
        self._batches: list[_Batch] = []

    def begin(self, addresses: Array, values: Array, lanes: Array) -> None:
        rows = self._shared.begin_copy(addresses, values.shape[1], self._blocks[lanes], lanes)
        self._batches.append(_Batch(lanes, rows, values, self._committed[lanes]))

    def commit(self, lanes: Array) -> None:
        self._committed[lanes] += 1

    def wait(self, lanes: Array, groups: int) -> None:
        """Until at most the last ``groups`` groups of these lanes are on their way."""
        complete = np.zeros(len(self._committed), np.int64)  # groups with lower numbers are
        complete[lanes] = self._committed[lanes] - groups
        left = []
        for batch in self._batches:
            done = batch.groups < complete[batch.lanes]
            if done.any():
                self._shared.finish_copy(batch.rows[done], batch.values[done], batch.lanes[done])
            if not done.all():
                rest = ~done
                left.append(_Batch(batch.lanes[rest], batch.rows[rest], batch.values[rest], batch.groups[rest]))
        self._batches = left
