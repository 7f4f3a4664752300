"""Commands on image files: convert, doctor."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastssl.cli.console import console, echo
from fastssl.cli.parsing import Parser

if TYPE_CHECKING:
    from rich.progress import Progress


def convert(arguments: list[str]) -> None:
    parser = Parser(prog="fastssl convert", description="Write images in an engine's format.")
    parser.add_argument("source", help="folder of images, .tar or folder of .tar, .npz")
    parser.add_argument("target", help="NAME.npy, NAME.beton, or NAME for a folder of tar shards")
    parser.add_argument("--part", default="", help="train, val or test, where the source has parts")
    parser.add_argument("--size", type=int, help="px; the shorter side is reduced to it")
    parser.add_argument("--quality", type=int, default=90, help="of JPEGs that are re-encoded")
    parser.add_argument("--workers", type=int, help="threads; one per core by default")
    _add_decoding(parser)
    parser.add_argument("--on-damage", choices=("keep", "skip"), default="keep")
    parser.add_argument("--on-corrupt", choices=("skip", "stop"), default="skip")
    parser.add_argument("--quota", type=float, default=0.01, help="fraction that may be unreadable")
    options = vars(parser.parse_args(arguments))
    from rich.progress import Progress

    from fastssl_pipelines.sources.convert import convert

    with Progress(console=console(), transient=True) as bar:
        report = convert(
            progress=_progress(bar, "converting"), decoding=_decoding(options), **options
        )
    for name, reason in report.skipped.items():
        echo(f"skipped: {name}: {reason}")
    for name, damage in report.damaged.items():
        echo(f"damaged, written as decoded: {name}: {damage}")
    echo(f"{report.written} images in {report.target}, {len(report.skipped)} skipped")


def doctor(arguments: list[str]) -> None:
    parser = Parser(prog="fastssl doctor", description="Decode every image and report problems.")
    parser.add_argument("--data", required=True, help="folder of images, .tar shards, or .beton")
    parser.add_argument("--workers", type=int, help="threads; one per core by default")
    _add_decoding(parser)
    options = vars(parser.parse_args(arguments))
    from rich.progress import Progress

    from fastssl_pipelines.sources.doctor import diagnose

    source = options.pop("data")
    with Progress(console=console(), transient=True) as bar:
        progress = _progress(bar, "reading")
        found = diagnose(source, decoding=_decoding(options), progress=progress, **options)
    echo("\n".join(found.lines()))


def _add_decoding(parser: Parser) -> None:
    parser.add_argument("--image-key", default="", help="of tar samples with several images")
    parser.add_argument("--oriented", action="store_true", help="turn as the EXIF tag says")
    parser.add_argument("--depth", default="", help="type, data or LOW:HIGH, of more than 8 bits")
    parser.add_argument("--bands", default="", help="such as 4,3,2, of images with more than four")
    parser.add_argument("--max-pixels", type=int, help="of one image; more is unreadable")


def _decoding(options: dict[str, Any]) -> Any:
    """The `Decoding` of the options of `_add_decoding`, which are taken out of them."""
    from fastssl_pipelines.sources.decoding import Decoding, parse_bands
    from fastssl_pipelines.sources.pillow import MAX_PIXELS

    oriented, depth = options.pop("oriented"), options.pop("depth")
    bands, max_pixels = parse_bands(options.pop("bands")), options.pop("max_pixels")
    return Decoding(oriented, depth, bands, MAX_PIXELS if max_pixels is None else max_pixels)


def _progress(bar: "Progress", what: str) -> Callable[[int, int], None]:
    task = bar.add_task(what, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)
