"""Commands on image files: convert, doctor."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastssl.cli.console import console, echo
from fastssl.cli.parsing import Parser

if TYPE_CHECKING:
    from rich.progress import Progress


def convert(arguments: list[str]) -> None:
    parser = Parser(prog="fastssl convert", description="Write images in an engine's format.")
    parser.add_argument("source", help="folder of images, .tar or folder of .tar, .npz")
    parser.add_argument("target", help="NAME.npy, NAME.beton, or NAME for a folder of tar shards")
    parser.add_argument("--size", type=int, help="px; the shorter side is reduced to it")
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs that are re-encoded")
    parser.add_argument("--workers", type=int, help="threads; one per core by default")
    parser.add_argument("--on-corrupt", choices=("skip", "stop"), default="skip")
    parser.add_argument("--quota", type=float, default=0.01, help="fraction that may be unreadable")
    options = vars(parser.parse_args(arguments))
    from rich.progress import Progress

    from fastssl_pipelines.sources.convert import convert

    with Progress(console=console(), transient=True) as bar:
        report = convert(progress=_progress(bar, "converting"), **options)
    for name, reason in report.skipped.items():
        echo(f"skipped: {name}: {reason}")
    echo(f"{report.written} images in {report.target}, {len(report.skipped)} skipped")


def doctor(arguments: list[str]) -> None:
    parser = Parser(prog="fastssl doctor", description="Decode every image and report problems.")
    parser.add_argument("--data", required=True, help="folder of images, .tar shards, or .beton")
    parser.add_argument("--workers", type=int, help="threads; one per core by default")
    options = parser.parse_args(arguments)
    from rich.progress import Progress

    from fastssl_pipelines.sources.doctor import diagnose

    with Progress(console=console(), transient=True) as bar:
        found = diagnose(options.data, workers=options.workers, progress=_progress(bar, "reading"))
    echo("\n".join(found.lines()))


def _progress(bar: "Progress", what: str) -> Callable[[int, int], None]:
    task = bar.add_task(what, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)
