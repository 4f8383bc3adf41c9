"""Figures of serving benchmarks, from time stamps made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionaccel_bench.serve.load import Run, Trace
from visionaccel_bench.serve.serve_report import Bound, Spread, bound, device_finish, figures, overlap, stalls

TIMES = st.lists(st.floats(0, 100), min_size=1, max_size=50)


def text(*arrivals, sent=0.0, number=0):
    return Trace(f"text {number}", "text", sent, arrivals, len(arrivals))


def image(sent, first, last, tokens=2, number=0):
    return Trace(f"image {number}", "image", sent, (first, last), tokens)


def test_percentiles_are_interpolated():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(p50=3.0, p90=4.6, p99=pytest.approx(4.96), max=5.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)
    assert Spread.of([]) is None


@given(TIMES)
def test_percentiles_ascend_and_lie_among_the_times(times):
    spread = Spread.of(times)
    assert min(times) <= spread.p50 <= spread.p90 <= spread.p99 <= spread.max == max(times)


@given(TIMES)
def test_percentiles_are_numpys(times):
    import numpy as np

    spread = Spread.of(times)
    expected = np.percentile(times, [50, 90, 99, 100])
    assert [spread.p50, spread.p90, spread.p99, spread.max] == pytest.approx(expected, abs=1e-9)


def test_only_gaps_over_a_tenth_of_a_second_are_stalls():
    found = stalls([text(0.0, 0.05, 0.55, 0.6), text(0.0, 0.09, 0.39, 0.45)])
    assert found.number == 2
    assert found.seconds == pytest.approx(0.5 + 0.3)
    assert found.longest_seconds == pytest.approx(0.5)


def test_the_wait_for_the_first_token_is_no_stall():
    assert stalls([text(5.0, 5.05)]).number == 0


def test_stalls_are_the_mean_of_the_repetitions():
    found = figures([Run((text(0.0, 0.2),)), Run((text(0.0, 0.4, 0.8),))])
    assert found.stalls.number == 1.5
    assert found.stalls.seconds == pytest.approx(0.5)
    assert found.stalls.longest_seconds == pytest.approx(0.4)


@given(st.lists(st.floats(0.001, 2), min_size=1, max_size=40))
def test_stalls_are_never_longer_than_the_stream(gaps):
    arrivals = [0.0]
    for gap in gaps:
        arrivals.append(arrivals[-1] + gap)
    found = stalls([text(*arrivals)])
    assert 0 <= found.seconds <= arrivals[-1] + 1e-9
    assert found.seconds >= 0.1 * found.number


def test_throughput_counts_the_servers_tokens_and_the_time_of_the_images():
    run = Run((text(0.1, 1.0, 2.0), image(1.0, 2.0, 3.0, tokens=8), image(1.5, 2.5, 5.0, tokens=8)))
    found = figures([run])
    assert found.wall_seconds == 5.0
    assert found.tokens_per_second == pytest.approx(19 / 5)
    assert found.image_requests_per_second == pytest.approx(2 / 4)


def test_latencies_of_text_and_images_are_apart():
    found = figures([Run((text(0.1, 0.2, 0.3), image(1.0, 3.0, 3.5)))])
    assert found.text.ttft_seconds.max == pytest.approx(0.1)
    assert found.text.itl_seconds.max == pytest.approx(0.1)
    assert found.images.ttft_seconds.max == pytest.approx(2.0)
    assert found.images.itl_seconds.max == pytest.approx(0.5)


def test_the_wall_is_the_median_of_the_repetitions_and_percentiles_are_of_all():
    runs = [Run((text(1.0, 2.0),)), Run((text(1.0, 9.0),)), Run((text(3.0, 4.0),))]
    found = figures(runs)
    assert found.wall_seconds_each == (2.0, 9.0, 4.0)
    assert found.wall_seconds == 4.0
    assert found.text.ttft_seconds.max == 3.0


def test_what_there_is_none_of_is_none():
    found = figures([Run((text(0.1),))])
    assert found.images is None
    assert found.image_requests_per_second is None
    assert found.covered is None
    assert found.text.itl_seconds is None
    assert figures([Run((image(0.0, 1.0, 2.0),))]).stalls is None


@pytest.mark.parametrize(("last", "covered"), [(3.0, True), (2.0, False)])
def test_a_text_stream_must_last_until_the_images_have_their_first_tokens(last, covered):
    assert figures([Run((text(0.1, last), image(0.5, 2.5, 4.0)))]).covered is covered


def test_the_clients_own_pauses_are_told():
    runs = [Run((text(0.1, 2.0),), ((0.5, 1.0), (1.6, 0.2))), Run((text(0.1, 0.2),))]
    assert figures(runs).client_pause_seconds == pytest.approx(0.6)


def test_a_device_that_is_busy_starts_when_the_first_image_is_sent():
    run = Run((text(0.1), image(0.5, 9, 9), image(0.8, 9, 9), image(1.1, 9, 9)))
    assert device_finish(run, 1.0) == pytest.approx(0.5 + 3 * 1.0)


def test_a_device_that_is_faster_than_the_images_come_waits_for_the_last():
    run = Run((text(0.1), image(0.5, 9, 9), image(2.5, 9, 9)))
    assert device_finish(run, 1.0) == pytest.approx(3.5)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=20), st.floats(0, 5))
def test_a_device_needs_at_least_its_work_and_at_most_that_after_the_last_image(sent, each):
    finish = device_finish(Run((text(0.1), *(image(when, 99, 99) for when in sent))), each)
    assert finish >= min(sent) + each * len(sent) - 1e-9
    assert finish <= max(sent) + each * len(sent) + 1e-9


@pytest.mark.parametrize(("decode", "seconds"), [(1.0, 2.5), (4.0, 4.0)])
def test_the_bound_is_the_greater_of_device_and_decode(decode, seconds):
    found = bound([Run((text(0.1), image(0.5, 9, 9), image(0.5, 9, 9)))], 1.0, decode)
    assert found.device_seconds == pytest.approx(2.5)
    assert found.seconds == pytest.approx(seconds)


def test_the_gain_of_concurrent_requests_and_its_bound():
    found = overlap(12.0, 8.0, Bound(device_seconds=6.0, decode_seconds=7.5, seconds=7.5))
    assert found.ratio == pytest.approx(1.5)
    assert found.bound == pytest.approx(12 / 7.5)
    assert overlap(12.0, 8.0, None).bound is None
