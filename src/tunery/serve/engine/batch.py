"""Which rows are computed: the queue, the rows that are being answered, and what each gives to the next step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tunery.errors import TuneryError
from tunery.inference.kv_cache import SMALLEST, Cache, CacheFullError
from tunery.inference.prefix import BLOCK, PrefixStore, chain
from tunery.inference.runner import Runner, RunnerPart
from tunery.models.device import available_memory
from tunery.serve.engine.running import RunningRequest

ROOM_AHEAD = 32
"""A new row gets a place for so many tokens of its answer at once."""

STEP_TOKENS = {"cpu": 256, "cuda": 2048}
"""Most tokens of a step while rows are decoding; twice as many when none is."""


@dataclass(frozen=True)
class BatchLimits:
    """What the engine takes on.

    Attributes:
        rows: answered at a time.
        waiting: rows in the queue; a request beyond is told to come again.
        adapters: in memory.
        step_tokens: see STEP_TOKENS.
        cache_bytes: for the rows' keys and values; None is two fifths of the memory free once the base is loaded.
        prefix_bytes: for those of prompts that may come again; None is a tenth, at most 1 GiB.
    """

    rows: int = 64
    waiting: int = 256
    adapters: int = 16
    step_tokens: int | None = None
    cache_bytes: int | None = None
    prefix_bytes: int | None = None


class Batch:
    """The rows. Used by the engine's thread alone.

    Attributes:
        waiting: in order of arrival.
        active: with a place in the cache, in order of joining.
        put_back: the last plan let rows wait again, because memory is short.
    """

    def __init__(self, runner: Runner, limits: BatchLimits):
        shapes, dtype, device = runner.shapes, runner.dtype, runner.device
        free = available_memory(device)
        cache_bytes = limits.cache_bytes if limits.cache_bytes is not None else free * 2 // 5
        prefix_bytes = limits.prefix_bytes if limits.prefix_bytes is not None else min(free // 10, 1 << 30)
        self.limits, self.bank = limits, runner.bank
        self.cache = Cache(shapes, dtype, device, cache_bytes)
        self.prefix = PrefixStore(shapes, dtype, device, prefix_bytes)
        self.context = min(runner.context, max(self.cache.longest_row, SMALLEST))
        self.waiting: deque[RunningRequest] = deque()
        self.active: list[RunningRequest] = []
        self.put_back = False
        self._step_tokens = limits.step_tokens or STEP_TOKENS.get(device.type, STEP_TOKENS["cpu"])
        self._coming: dict[bytes, RunningRequest] = {}
        """Blocks that are being computed, and by which row."""

    # ----------------------------------------------------------------- joining and leaving

    def admit(self) -> list[tuple[RunningRequest, TuneryError]]:
        """Let waiting rows join, in order; a row that waits for its adapter, or for another row to compute the prompt
        that both begin with, is passed by.

        Returns:
            Rows that left the queue because their adapters cannot be used.
        """
        later: list[RunningRequest] = []
        failed: list[tuple[RunningRequest, TuneryError]] = []
        while self.waiting and len(self.active) < self.limits.rows:
            row = self.waiting.popleft()
            if row.asked.cancelled:
                continue
            try:
                if not self._join(row):
                    later.append(row)
            except CacheFullError:
                later.append(row)
                break
            except TuneryError as error:
                failed.append((row, error))
        self.waiting.extendleft(reversed(later))
        return failed

    def _join(self, row: RunningRequest) -> bool:
        """Give a row its adapter, a place, and what is known of its prompt; false if it has to wait.

        Raises:
            CacheFullError: there is no place.
            TuneryError: its adapter cannot be used.
        """
        key, folder = row.asked.key, row.asked.folder
        adapter = self.bank.want(key, folder) if folder is not None else None
        if folder is not None and adapter is None:
            return False
        if row.names is None:
            row.names = chain(key, row.tokens)
        found = 0
        if self.prefix.capacity and not row.scoring:
            usable = row.names[: (len(row.tokens) - 1) // BLOCK]  # the last token is always computed
            found = self.prefix.match(usable)
            if found < len(usable) and usable[found] in self._coming:
                return False
        row.place = self.cache.take(len(row.tokens) + min(row.most - row.answered, ROOM_AHEAD))
        self.prefix.copy_to(row.place, row.names[:found])
        row.computed, row.kept = found * BLOCK, found
        if row.cached is None:
            row.cached = row.computed
        if self.prefix.capacity:
            for name in row.names[found:]:
                self._coming.setdefault(name, row)
        if adapter is not None:
            adapter.users += 1
        row.adapter = adapter
        self.active.append(row)
        return True

    def leave(self, row: RunningRequest, sound: bool = True) -> None:
        """Take a row out of the batch. What it computed may serve others, unless it is not `sound`."""
        assert row.place is not None
        assert row.names is not None
        if sound:
            names = chain(row.asked.key, row.tokens[: row.computed], row.names[: row.computed // BLOCK])
            self.prefix.put(row.asked.key, names, row.place, row.kept, len(names))
        else:
            self.prefix.drop(row.names)
            row.place.shelf.wipe(row.place.slot)
        for name in [name for name, owner in self._coming.items() if owner is row]:
            del self._coming[name]
        self.cache.release(row.place)
        if row.adapter is not None:
            row.adapter.users -= 1
        row.place = row.adapter = None
        self.active.remove(row)

    def clear(self) -> None:
        """Take out all rows, the waiting ones too."""
        for row in list(self.active):
            self.leave(row, sound=False)
        self.waiting.clear()

    def forget(self, key: str) -> None:
        """Drop what is kept of an adapter."""
        self.bank.forget(key)
        self.prefix.forget(key)

    # ----------------------------------------------------------------- steps

    def plan(self) -> list[RunnerPart]:
        """What every row gives to the next step."""
        self.put_back = False
        self.cache.tidy()
        decoding = sum(row.pending == 1 for row in self.active)
        budget = self._step_tokens - decoding if decoding else 2 * self._step_tokens
        parts = []
        for row in list(self.active):
            count = 1 if row.pending == 1 else min(row.pending, budget)
            if row.place is None or count < 1 or not self._make_room(row, row.computed + count):
                continue
            budget -= 0 if row.pending == 1 else count
            tokens = row.tokens[row.computed : row.computed + count]
            keep = count if row.scoring else int(count == row.pending)
            parts.append(RunnerPart(row, row.place, row.adapter, tokens, row.computed, keep))
        return parts

    def _make_room(self, row: RunningRequest, length: int) -> bool:
        """Have a place of so many tokens; the youngest rows wait again if there is none. False if it is this one."""
        while True:
            assert row.place is not None
            try:
                self.cache.extend(row.place, length, row.computed)
                return True
            except CacheFullError:
                youngest = self.active[-1]
                self._put_back(youngest)
                if youngest is row:
                    return False

    def _put_back(self, row: RunningRequest) -> None:
        """Let a row wait again; it will be computed anew."""
        self.leave(row)
        row.computed, row.names = 0, None
        self.waiting.appendleft(row)
        self.put_back = True

    def keep_blocks(self, row: RunningRequest) -> None:
        """Put the blocks of its prompt that are complete now into the prefix store."""
        if row.place is None or row.names is None:
            return
        stop = min(row.computed // BLOCK, len(row.names))
        if stop <= row.kept:
            return
        self.prefix.put(row.asked.key, row.names, row.place, row.kept, stop)
        for name in row.names[row.kept : stop]:
            if self._coming.get(name) is row:
                del self._coming[name]
        row.kept = stop
