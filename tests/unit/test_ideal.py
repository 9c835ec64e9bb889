"""The event simulation of `tora.bench.ideal`, and what it and the driver's bench refuse."""

from __future__ import annotations

import pytest

from tora.bench import driver
from tora.bench.ideal import main, time_per_step


@pytest.mark.parametrize(("max_staleness", "wanted"), [(0, 2.0), (1, 1.0), (3, 1.0)])
@pytest.mark.parametrize("oversample", [0.0, 0.25])
def test_without_jitter(max_staleness: int, wanted: float, oversample: float) -> None:
    """Generating and learning take turns, or are hidden by each other after the first wave."""
    time = time_per_step(0.0, oversample, 8, max_staleness, 50)
    assert time == pytest.approx(wanted if max_staleness == 0 else wanted + 1 / 50)


def test_a_synchronous_step_waits_for_the_slowest() -> None:
    """1, and the mean of the greater of two lognormal durations of mean 1: 2 Phi(sigma / sqrt 2), by integration."""
    assert time_per_step(0.5, 0.0, 2, 0, 20_000) == pytest.approx(1 + 2 * 0.6382, rel=0.01)


def test_what_helps() -> None:
    waiting, spare, older = (time_per_step(0.5, s, 16, k, 1000) for s, k in ((0.0, 1), (0.25, 1), (0.25, 2)))
    assert waiting > 1.2 * spare and spare > 1.1 * older > 1.1
    in_parts = [time_per_step(0.5, spare, 16, 1, 1000, parts=4) for spare in (0.0, 0.25)]
    assert waiting > 1.2 * in_parts[0] and spare > 1.07 * in_parts[1]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--actors", "4", "--steps", "20"]) == 0
    assert "oversample 0.25" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--actors", "0"], ["--steps", "0"], ["--staleness", "-1"], ["--parts", "0"]])
def test_a_number_out_of_range(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--workers", "0"], ["--steps", "0"], ["--image-bytes", "-1"]])
def test_a_number_out_of_range_for_the_driver(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.main(words)
    assert "at least 1" in capsys.readouterr().err
