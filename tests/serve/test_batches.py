"""Who shares a call with whom, and what a bad item costs the others."""

import asyncio
import threading

import pytest
from serve_cases import ROOT  # skips where the extra is missing

from ehi.serve.batches import Batcher

assert ROOT


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_items_wait_for_each_other_and_answers_find_their_way():
    calls = []

    def answer(key, items):
        calls.append((key, list(items)))
        return [(key, item) for item in items]

    async def main():
        batcher = Batcher(answer, most=4, seconds=0.02)
        asked = [("a", [1]), ("b", [2]), ("a", [3, 4]), ("a", [5, 6]), ("b", [])]
        found = await asyncio.gather(*(batcher.ask(*pair) for pair in asked))
        for (key, items), answers in zip(asked, found, strict=True):
            assert answers == [(key, item) for item in items]
        batcher.close()

    run(main())
    assert sorted(calls) == [("a", [1, 3, 4]), ("a", [5, 6]), ("b", [2])]


def test_while_a_call_runs_the_next_one_grows():
    sizes, go = [], threading.Event()

    def answer(key, items):
        sizes.append(len(items))
        assert go.wait(10)
        return items

    async def main():
        batcher = Batcher(answer, most=8)
        first = asyncio.create_task(batcher.ask(0, [0]))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(batcher.ask(0, [i])) for i in range(1, 12)]
        await asyncio.sleep(0.05)
        go.set()
        assert await first == [0]
        assert await asyncio.gather(*others) == [[i] for i in range(1, 12)]
        batcher.close()

    run(main())
    assert sizes == [1, 8, 3]


def test_a_bad_item_spoils_only_its_own_answer():
    def answer(key, items):
        if "bad" in items:
            raise ValueError("bad")
        return items

    async def main():
        batcher = Batcher(answer, most=8, seconds=0.01)
        asked = (["x"], ["bad"], ["y", "z"])
        found = await asyncio.gather(
            *(batcher.ask(0, items) for items in asked), return_exceptions=True
        )
        assert found[0] == ["x"] and found[2] == ["y", "z"]
        assert isinstance(found[1], ValueError)
        with pytest.raises(ValueError, match="bad"):
            await batcher.ask(0, ["bad"])
        assert await batcher.ask(0, ["good"]) == ["good"]
        batcher.close()

    run(main())


def test_clients_that_go_away_leave_the_others_alone():
    async def main():
        batcher = Batcher(lambda key, items: items, most=8, seconds=0.05)
        gone = asyncio.create_task(batcher.ask(0, [1]))
        stays = asyncio.create_task(batcher.ask(0, [2]))
        await asyncio.sleep(0.01)
        gone.cancel()
        assert await stays == [2]
        batcher.close()

    run(main())
