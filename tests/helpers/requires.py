"""Tests of an engine need its library: skipped where it is missing, except under CI."""

import os
from importlib.util import find_spec

import pytest


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark tests that need these libraries. Under CI they run, and fail, where one is missing."""
    missing = [name for name in names if not _is_installed(name)]
    reason = f"not installed: {', '.join(missing)}"
    return pytest.mark.skipif(bool(missing) and not os.environ.get("CI"), reason=reason)


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
