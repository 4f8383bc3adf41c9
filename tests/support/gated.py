"""Encoders whose device computes when the test lets it."""

import threading
import time
from dataclasses import replace

import numpy as np

from visionaccel import open_encoder
from visionaccel.backends import Session, default_registry
from visionaccel.encoder import Encoder, OpenProgram
from visionaccel.trust import ChainLink, GuardedEncoder


class Gate(Session):
    """Wraps a session. While it is shut, calls wait in it, as those that `block` names; `calls` has their patches."""

    def __init__(self, session, **capabilities):
        self.session = session
        self.capabilities = replace(session.capabilities, **capabilities)
        self.calls = []
        self.inside = 0
        self.most_inside = 0
        self.closed = False
        self.fail = lambda patches: None
        self.block = lambda patches: False
        self._changed = threading.Condition()
        self._passes = float("inf")

    def shut(self):
        self._passes = 0

    def let_in(self, calls=float("inf")):
        """Let some calls through, or all."""
        with self._changed:
            self._passes += calls
            self._changed.notify_all()

    def run(self, inputs):
        patches = inputs["pixel_values"]
        with self._changed:
            self.calls.append(len(patches))
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._passes > 0 and not self.block(patches))
            self._passes -= 1
            self.inside -= 1
        error = self.fail(patches)
        if error is not None:
            raise error
        return self.session.run(inputs)

    def wait_for_calls(self, number):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= number, 20)

    def close(self):
        self.closed = True
        self.session.close()


def gated(checkpoint, fallback=None, deadline=120.0, **capabilities) -> tuple[GuardedEncoder, Gate]:
    """A guarded encoder of a checkpoint, and the gate in it."""
    encoder = open_encoder(checkpoint, backend="torch_ref")
    (opened,) = encoder.programs
    gate = Gate(opened.session, **capabilities)
    programs = [OpenProgram(opened.program, opened.host, gate)]
    others = [] if fallback is None else [ChainLink("fallback", fallback, deadline=deadline, cool_down=0.2)]
    first = ChainLink(
        "gated", Encoder(encoder.tower, "gated", programs, default_registry()), deadline=deadline, cool_down=0.2
    )
    return GuardedEncoder(first, others), gate


def wait_until(condition, seconds=20):
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.005)


def refuse_once(monkeypatch, name):
    """Have the next thread of that name not start, as where a limit is reached; returns a list of those refused."""
    start, refused = threading.Thread.start, []

    def start_later(thread):
        if thread.name == name and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_later)
    return refused


def image(seed, grid=(1, 4, 4), width=96):
    """Random patches of one image of the tiny tower."""
    return np.random.default_rng(seed).standard_normal((grid[0] * grid[1] * grid[2], width), dtype=np.float32)
