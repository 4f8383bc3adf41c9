"""A process of checks is ended once, with all that it started."""

import threading

from visionaccel.core.child_groups import ChildGroup
from visionaccel.isolation import CheckProcess


def test_a_process_that_does_not_die_is_waited_for_once(monkeypatch):
    """One that is stuck in a driver takes seconds each time."""
    ended, end = [], ChildGroup.end

    def counted(group, seconds=0.0):
        ended.append(group)
        return end(group, seconds)

    monkeypatch.setattr(ChildGroup, "end", counted)
    with CheckProcess("device", "visionaccel.no_such_module", [], 60.0) as child:
        (finding,) = child.findings()
        assert "ended with status 1 before it answered" in finding.detail
    assert len(ended) == 1
    with CheckProcess("device", "visionaccel.no_such_module", [], 60.0):
        pass
    assert len(ended) == 2, "also without asking for findings"


def test_a_process_whose_output_no_thread_can_read_is_ended_and_found(monkeypatch):
    ended, end, start = [], ChildGroup.end, threading.Thread.start

    def recorded(group, seconds=0.0):
        ended.append(end(group, seconds))
        return ended[-1]

    def refuse(thread):
        if thread._target.__name__ == "_keep_end":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(ChildGroup, "end", recorded)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with CheckProcess("device", "visionaccel.no_such_module", [], 60.0) as child:
        (finding,) = child.findings()
    assert (finding.status, finding.name) == ("failure", "device")
    assert "can't start new thread" in finding.detail
    assert len(ended) == 1
