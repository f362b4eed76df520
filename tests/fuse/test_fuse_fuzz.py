"""Random chains of random styles, in all memory modes, dtypes and layouts: as eager, or unfused."""

from __future__ import annotations

import pytest

from tests.support.fuse_fuzz import check

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:memory=.*walked back"),
]


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_no_difference(first):
    differences = {seed: check(seed) for seed in range(first, first + 20)}
    assert not any(differences.values()), {s: d for s, d in differences.items() if d}
