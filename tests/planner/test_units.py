import pytest

from moejax.planner.units import byte_unit, quantity, rounded


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.77e10, "B/s", "17.7 GB/s"),
        (9.4e-6, "s", "9.4 µs"),
        (240e12, "FLOP/s", "240 TFLOP/s"),
        (7e9, "FLOP/s", "7 GFLOP/s"),
        (2.111e6, "FLOP", "2.11 MFLOP"),
        (999.9e6, "B", "1 GB"),
        (999.4e6, "B", "999 MB"),
        (1e-12, "s", "0.001 ns"),
        (5e18, "B", "5000 PB"),
        (12, "B", "12 B"),
        (0, "B", "0 B"),
    ],
)
def test_quantities_have_the_prefix_that_fits(value, unit, text):
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"), [(135_821, "136,000"), (303.4, "303"), (27.65, "27.6"), (0.0512, "0.0512"), (0, "0")]
)
def test_rounded_keeps_three_digits(value, text):
    assert rounded(value) == text


@pytest.mark.parametrize(("largest", "unit"), [(5e9, (1e9, "GB")), (14.8e6, (1e6, "MB")), (900, (1e3, "kB"))])
def test_a_table_of_bytes_has_the_unit_of_its_largest(largest, unit):
    assert byte_unit(largest) == unit
