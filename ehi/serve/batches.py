"""Questions that arrive together become one call.

An index answers a batch several times faster per query than one query at a time. So a
question waits for others: for `seconds` at most while a worker is free, and for as long
as all workers are busy. Questions of different keys never share a call.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class _Group:
    """Questions of one key that will be answered by one call."""

    key: Hashable
    asked: list[tuple[list, asyncio.Future]] = field(default_factory=list)
    size: int = 0
    due: bool = False


class Batcher:
    """Gathers the items of many callers and hands each caller its own answers.

    Args:
        answer: (key, items) -> as many answers; runs in a thread.
        most: items of one call. A caller's items are never divided, so a caller with
            more than that gets a call of its own.
        seconds: how long the first item waits for others.
        workers: calls that run at the same time.

    Example:
        >>> async def main():
        ...     batcher = Batcher(lambda key, items: [key * i for i in items], most=8)
        ...     return await asyncio.gather(batcher.ask(2, [1, 5]), batcher.ask(3, [1]))
        >>> asyncio.run(main())
        [[2, 10], [3]]
    """

    def __init__(
        self,
        answer: Callable[[Any, list], Sequence],
        *,
        most: int,
        seconds: float = 0.0,
        workers: int = 1,
    ):
        self.answer, self.most, self.seconds = answer, most, seconds
        self.free = workers
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="search")
        self.open: dict[Hashable, _Group] = {}  # groups that may still grow
        self.due: deque[_Group] = deque()  # those that wait for a worker

    async def ask(self, key: Hashable, items: list) -> list:
        """The answers to some items, in their order.

        Raises:
            Whatever `answer` raises for these items alone.
        """
        loop = asyncio.get_running_loop()
        group = self.open.get(key)
        if group is not None and group.size + len(items) > self.most:
            self._make_due(group)
            group = None
        if group is None:
            group = self.open[key] = _Group(key)
            loop.call_later(self.seconds, self._make_due, group)
        future = loop.create_future()
        group.asked.append((items, future))
        group.size += len(items)
        if group.size >= self.most:
            self._make_due(group)
        return await future

    def close(self) -> None:
        """Ends the threads; what runs is finished."""
        self.pool.shutdown(wait=True)

    def _make_due(self, group):
        if not group.due:
            group.due = True
            self.due.append(group)
            self._start()

    def _start(self):
        loop = asyncio.get_running_loop()
        while self.due and self.free:
            group = self.due.popleft()
            if self.open.get(group.key) is group:
                del self.open[group.key]
            self.free -= 1
            call = loop.run_in_executor(self.pool, self._run, group)
            call.add_done_callback(lambda call, group=group: self._finish(group, call))

    def _run(self, group):
        """One outcome for each caller: a list of answers, or an exception."""
        parts = [items for items, _ in group.asked]
        try:
            found = self.answer(group.key, [item for part in parts for item in part])
        except Exception as error:
            if len(parts) == 1:
                return [error]
            # One bad item must not spoil the answers of others.
            return [self._alone(group.key, part) for part in parts]
        outcomes, start = [], 0
        for part in parts:
            outcomes.append(found[start : start + len(part)])
            start += len(part)
        return outcomes

    def _alone(self, key, items):
        try:
            return self.answer(key, items)
        except Exception as error:
            return error

    def _finish(self, group, call):
        self.free += 1
        outcomes = call.result()
        for (_, future), outcome in zip(group.asked, outcomes, strict=True):
            if future.done():  # its client has gone
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        self._start()
