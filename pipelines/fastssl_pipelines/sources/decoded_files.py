"""The images of a data set, decoded by threads in a given order."""

import os
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from fastssl_pipelines.prefetch import prefetch
from fastssl_pipelines.sources.decoding import Decoded, Decoding, center_square, decode_checked
from fastssl_pipelines.sources.image_files import Encoded
from fastssl_pipelines.sources.unreadable import UnreadableError


def decoded_files(
    encoded: Encoded,
    numbers: Iterable[int],
    how: Decoding,
    size: int | None = None,
    threads: int | None = None,
) -> Generator[Decoded | UnreadableError, None, None]:
    """The pixels of each numbered image, or why it cannot be read, in the order of `numbers`.

    size: px; images become squares of this side; None keeps their own. threads: one per core by
    default; they end with the iterator.
    """
    threads = threads or os.cpu_count() or 1

    def load(number: int) -> Decoded | UnreadableError:
        try:
            pixels, damage = decode_checked(encoded.read(number), how)
        except UnreadableError as error:
            return error
        return Decoded(pixels if size is None else center_square(pixels, size), damage)

    with ThreadPoolExecutor(threads, thread_name_prefix="fastssl-load") as pool:

        def start(number: int) -> Future[Decoded | UnreadableError]:
            return pool.submit(load, number)

        yield from prefetch(numbers, start, lambda future: future.result(), 4 * threads)
