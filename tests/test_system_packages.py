"""What `make test` sets up beyond Python: FFCV is built against this machine's libraries and works.

Under CI it must be there; elsewhere a machine that cannot build it goes on without it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROUND_TRIP = """
import sys
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

class Squares:
    def __len__(self):
        return 8
    def __getitem__(self, k):
        return np.full((16, 16, 3), 10 * k, np.uint8), k

fields = {"image": RGBImageField(write_mode="raw"), "index": IntField()}
writer = DatasetWriter(sys.argv[1], fields, num_workers=1)
writer.from_indexed_dataset(Squares())
pipelines = {"image": [SimpleRGBImageDecoder()], "index": [IntDecoder()]}
options = {"order": OrderOption.SEQUENTIAL, "pipelines": pipelines, "drop_last": True}
loader = Loader(sys.argv[1], 4, 1, **options)
for images, index in loader:
    assert (images[:, 0, 0, 0] == 10 * index[:, 0]).all()
print("read", len(loader))
"""


@pytest.mark.slow
def test_ffcv_writes_and_reads(tmp_path: Path) -> None:
    if importlib.util.find_spec("ffcv") is None:
        assert not os.environ.get("CI"), "CI must have FFCV; see tests/system_packages.sh"
        pytest.skip("FFCV is not installed; `make test` says how to add it")
    command = [sys.executable, "-c", ROUND_TRIP, str(tmp_path / "squares.beton")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "read 2" in done.stdout, done.stderr


def test_missing_packages_are_named(tmp_path: Path) -> None:
    """On a machine without them and without apt-get, the script says what to run and fails."""
    script = Path(__file__).with_name("system_packages.sh")
    for tool in ("id", "python3"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}" if tool == "id" else sys.executable)
    done = subprocess.run(
        ["/bin/sh", str(script)], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "apt-get install libopencv-dev libturbojpeg0-dev pkg-config" in done.stderr
