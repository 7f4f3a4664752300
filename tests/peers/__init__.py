"""Tests that other libraries run on their losses, run on ours: `make test-peers`.

Liger-Kernel and cut-cross-entropy ship their tests in their source releases; `as_liger.py` and
`as_cut_cross_entropy.py` put our function in the place of theirs and pytest runs the files as they
are. torch ships the inputs and the references of its tests, not the tests: `torch_cases.py` loops
over them. lightly ships neither: `lightly_cases.py` compares with the installed library over the
sizes of its public tests.

`suites.py` declares what is run, what does not apply and what is expected to fail, each with its
reason. A failure, a skip or a pass that is not declared fails the job, and so do counts that differ
from those in kernels/README.md.
"""
