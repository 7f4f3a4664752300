"""Start work ahead of its use, on threads or devices."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

Started = TypeVar("Started")
Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNKS_PER_THREAD = 4  # smaller chunks balance the load: images differ in size


def prefetch(
    items: Iterable[Item],
    start: Callable[[Item], Started],
    finish: Callable[[Started], Result],
    depth: int,
) -> Iterator[Result]:
    """finish(start(item)) of each item in order, with `depth` more items started beforehand."""
    started: deque[Started] = deque()
    for item in items:
        started.append(start(item))
        if len(started) > depth:
            yield finish(started.popleft())
    while started:
        yield finish(started.popleft())


def in_chunks(
    pool: Executor, threads: int, work: Callable[[Item], Result], items: Sequence[Item]
) -> list[Future[list[Result]]]:
    """Submit work(item) of each item to the `threads` threads of `pool`, several items a task.

    `results` collects what comes back.
    """
    size = -(-len(items) // (threads * CHUNKS_PER_THREAD)) or 1
    chunks = [items[k : k + size] for k in range(0, len(items), size)]
    return [pool.submit(lambda chunk: [work(item) for item in chunk], chunk) for chunk in chunks]


def results(chunks: Iterable[Future[list[Result]]]) -> list[Result]:
    """The results of `in_chunks`, in the order of its items; waits for all of them."""
    return [result for chunk in chunks for result in chunk.result()]
