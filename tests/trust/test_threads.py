"""The thread for all jobs that are due again and again, and that for calls in their order."""

import multiprocessing
import threading
import time

import pytest

from gated import refuse_once, wait_until
from visionaccel.trust import background
from visionaccel.trust.threads import Background, InOrder


@pytest.fixture
def jobs():
    return Background()


def test_each_job_runs_at_once_and_whenever_it_is_due_on_one_thread(jobs):
    ran = {0.01: [], 3600.0: []}

    def job(seconds):
        ran[seconds].append(threading.current_thread())
        return seconds

    often, once = (lambda: job(0.01)), (lambda: job(3600.0))
    jobs.start(once)
    jobs.start(often)
    wait_until(lambda: len(ran[0.01]) >= 5)
    assert len(ran[3600.0]) == 1
    jobs.start(once)
    wait_until(lambda: len(ran[3600.0]) == 2)
    (thread,) = {*ran[0.01], *ran[3600.0]}
    jobs.stop(once)
    assert thread.is_alive()
    jobs.stop(often)
    assert not thread.is_alive()
    jobs.start(once)
    wait_until(lambda: len(ran[3600.0]) == 3)
    jobs.stop(once)


def test_a_job_that_raises_is_logged_and_runs_again_as_do_the_others(jobs, caplog, monkeypatch):
    monkeypatch.setattr("visionaccel.trust.threads._AFTER_A_FAULT", 0.01)
    ran, times = [], []

    def raises():
        times.append(time.monotonic())
        raise ValueError("of its own")

    def runs():
        ran.append(True)
        return 0.01

    jobs.start(raises)
    jobs.start(runs)
    wait_until(lambda: len(times) >= 2 and len(ran) >= 2)
    assert "of its own" in caplog.text
    jobs.stop(raises)
    jobs.stop(runs)


def test_a_job_that_is_done_runs_once_more_only_if_it_is_started_again(jobs):
    ran, once, again = [], threading.Event(), threading.Event()

    def job():
        ran.append(threading.current_thread())
        once.set()
        again.wait(20)

    jobs.start(job)
    assert once.wait(20)
    jobs.start(job)
    again.set()
    wait_until(lambda: len(ran) == 2)
    ran[0].join(20)
    assert len({*ran}) == 1
    assert not jobs._due


def test_a_job_may_stop_itself(jobs):
    ran = []

    def job():
        ran.append(threading.current_thread())
        jobs.stop(job)
        return 0.0

    jobs.start(job)
    wait_until(lambda: ran)
    ran[0].join(20)
    assert len(ran) == 1


def test_jobs_whose_thread_cannot_start_run_once_another_is_started(jobs, monkeypatch, caplog):
    ran = []

    def first():
        ran.append("first")
        return 3600.0

    def second():
        ran.append("second")
        return 3600.0

    refuse_once(monkeypatch, "visionaccel-background")
    jobs.start(first)
    assert "can't start new thread" in caplog.text
    jobs.start(second)
    wait_until(lambda: sorted(ran) == ["first", "second"])
    jobs.stop(first)
    jobs.stop(second)


def test_calls_whose_thread_cannot_start_are_made_once_another_is_added(monkeypatch, caplog):
    calls, made = InOrder("visionaccel-test"), []
    refuse_once(monkeypatch, "visionaccel-test")
    calls.add(lambda: made.append(1))
    assert "can't start new thread" in caplog.text
    calls.add(lambda: made.append(2))
    wait_until(lambda: made == [1, 2])


def test_while_a_call_hangs_the_last_calls_are_kept_and_all_can_be_dropped():
    calls, made, entered, go_on = InOrder("visionaccel-test"), [], threading.Event(), threading.Event()
    calls.add(lambda: (entered.set(), go_on.wait(20)))
    assert entered.wait(20)
    calls.add(lambda: made.append("dropped"))
    calls.clear()
    for number in range(70):
        calls.add(lambda number=number: made.append(number))
    assert len(calls) == 64
    go_on.set()
    wait_until(lambda: made == list(range(6, 70)))
    wait_until(lambda: not any(thread.name == "visionaccel-test" for thread in threading.enumerate()))


def test_a_call_that_raises_is_logged_and_the_calls_behind_it_are_made(monkeypatch, caplog):
    monkeypatch.setattr("visionaccel.trust.threads._AFTER_A_FAULT", 0.01)
    calls, made = InOrder("visionaccel-test"), []

    def raises():
        raise ValueError("of its own")

    calls.add(raises)
    calls.add(lambda: made.append(True))
    wait_until(lambda: made)
    assert "of its own" in caplog.text


def _ran_in_a_fork(queue):
    ran = threading.Event()

    def job():
        ran.set()
        return 3600.0

    inherited = len(background._due)
    background.start(job)
    queue.put((inherited, ran.wait(20)))


def test_a_fork_has_none_of_the_jobs_and_may_start_its_own():
    def job():
        return 3600.0

    background.start(job)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    process = fork.Process(target=_ran_in_a_fork, args=(queue,))
    process.start()
    assert queue.get() == (0, True)
    process.join(60)
    background.stop(job)
