"""What the README shows is run as it stands there."""

from __future__ import annotations

import re

import pytest

from tests.helpers import REPOSITORY

LONGEST = 30


@pytest.mark.serial
@pytest.mark.slow
def test_digits_are_learned_by_two_stages(run_mpi, tmp_path):
    """And by as many replicas as there are, with the same bits (test_hybrid.py). Under 30 lines; more than 95 % of the
    digits that were held out."""
    code, = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert code.count("\n") < LONGEST
    (tmp_path / "digits.py").write_text(code)
    found = run_mpi(2, [str(tmp_path / "digits.py")], timeout=280)
    assert found.rc == 0, found.stderr
    right = re.search(r"([\d.]+)% of 360 digits", found.stdout)
    assert right and float(right[1]) > 95, found.stdout
