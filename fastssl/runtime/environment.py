"""What a run needs of its process, whatever the caller or the container has set."""

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def torch_defaults() -> Iterator[None]:
    """torch's own defaults inside: float32, the CPU, gradients; afterwards the caller's."""
    import torch  # the command line provides a home before it imports torch

    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)


def provide_user() -> None:
    """Set USER and HOME where neither the environment nor the password file has them, as under the
    bare user number of a container: the caches of torch, matplotlib and timm look them up."""
    name = f"fastssl-uid{os.getuid()}"
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = name
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_temporary_home(name))


def _temporary_home(name: str) -> Path:
    """The folder `name` for temporary files, or where another user has made it, a new one."""
    home = Path(tempfile.gettempdir()) / name
    home.mkdir(mode=0o700, exist_ok=True)
    return home if home.stat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix=name))
