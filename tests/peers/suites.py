"""What each suite runs, what of it does not apply and what is expected to fail, and why."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tests.peers import as_cut_cross_entropy, as_liger
from tests.peers.outcomes import Suite

HERE = Path(__file__).parent
NO_PREDICTIONS = "predicted classes are not offered"
TWO_OF_ITS_OWN = "compares two functions of Liger-Kernel"
SLOW = "half precision at the large size is slow on a CPU"


def own(file: str) -> Callable[[Path], list[str]]:
    return lambda downloads: [str(HERE / file)]


SUITES = {
    "torch": Suite(
        version=version("torch"),
        install=own("torch_cases.py"),
        not_offered=("no linear layer for each position", "no probabilities as targets"),
    ),
    "cut-cross-entropy": Suite(
        version="25.1.1",
        install=as_cut_cross_entropy.install,
        not_offered=("the logit of the target alone is not offered",),
    ),
    "Liger-Kernel": Suite(
        version="0.8.5",
        install=as_liger.install,
        not_offered=(NO_PREDICTIONS,),
        inapplicable={
            "test_correctness_functional[*": TWO_OF_ITS_OWN,
            "test_correctness_token_scaling_consistency": TWO_OF_ITS_OWN,
            "test_correctness_with_token_accuracy[True-*": NO_PREDICTIONS,
            "test_correctness_with_predicted_tokens[*": NO_PREDICTIONS,
            "*-dtype0-*-8-128-1024-4096]": SLOW,  # bfloat16, the mean
            "*-dtype2-*-8-128-1024-4096]": SLOW,  # bfloat16, the sum
            "test_amp[*-8-128-1024-4096]": SLOW,
        },
    ),
    "lightly": Suite(
        version=version("lightly"),
        install=own("lightly_cases.py"),
    ),
}
