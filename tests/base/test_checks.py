"""What is refused as broken, and what a checksum tells apart."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.base.checks import checksum, require_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)])
def test_a_broken_value_is_counted_and_placed(value, shape):
    x = torch.ones(shape)
    require_finite(x, "activations", "look")
    place = tuple(size - 1 for size in shape)
    x[place] = value
    with pytest.raises(ValueError) as refused:
        require_finite(x, "activations", "look")
    assert str(refused.value) == f"1 of {x.numel()} activations are NaN or infinite, the first at {place}: look"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_values_are_not_broken(dtype):
    large, none = torch.full((2, 9), torch.finfo(dtype).max, dtype=dtype), torch.empty(0, 9, dtype=dtype)
    assert [require_finite(x, "activations", "look") for x in (large, none)] == [None, None]


def random(rows, columns, seed, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    st.integers(2, 5),
    st.integers(2, 5),
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_checksum_tells_order_place_and_value(rows, columns, seed, dtype):
    x = random(rows, columns, seed, dtype)
    others = [x.flip(0), x.flip(1), 2 * x, -x, x.clone(), x[:-1], x[:, :-1]]
    others[4][0, 0] = torch.nextafter(x[0, 0], x[0, 0] + 1)
    assert checksum(x) == checksum(x.clone()) == checksum(x.T.contiguous().T)
    assert len({checksum(x), *map(checksum, others)}) == 1 + len(others)


def test_checksums_go_on_and_tell_the_order_of_batches():
    a, b = random(4, 3, 0), random(4, 3, 1)
    assert checksum(torch.cat([a, b])) != checksum(b, checksum(a))
    assert len({checksum(b, checksum(a)), checksum(a, checksum(b)), checksum(a), checksum(b)}) == 4


def test_a_checksum_does_not_depend_on_threads():
    code = "import torch; from helpers.base.checks import checksum; torch.set_num_threads({}); "
    code += "print(checksum(torch.arange(3e6).view(3, -1).sin()), checksum(torch.arange(7.).cos()))"
    one, four = (subprocess.run([sys.executable, "-c", code.format(n)], capture_output=True).stdout for n in (1, 4))
    assert one and one == four
