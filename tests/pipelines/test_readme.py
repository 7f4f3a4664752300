"""The snippets of the README of the pipelines run."""

import re
from pathlib import Path

import pytest

from tests.helpers.requires import needs

pytestmark = needs("nvidia.dali", "ffcv")

README = (Path(__file__).parents[2] / "pipelines" / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number: int) -> None:
    exec(compile(SNIPPETS[number], "pipelines/README.md", "exec"), {})
