"""Contenders of the encode benchmark without processes."""

import numpy as np

from visionaccel_testing.checkpoints import TINY


class FakeProcess:
    """Stands in for `ContenderProcess`: each encode takes a second, and embeddings are ones."""

    started = 0.0

    def __init__(self, log, threads, python=None):
        self.folder, self.alive, self.label = log.parent, True, "products"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def open(self, contender, source, threads, deadline):
        self.label = contender.label
        return {}

    def ask(self, request, seconds):
        if request["do"] == "products":
            return {"rates": {}}
        if request["save"] is not None:
            np.save(request["save"], np.ones((4, TINY["out_hidden_size"]), np.float32))
        return {"seconds": [1.0], "processor_seconds": 1.0, "ended": 2.0, "resident_bytes": 1, "peak_bytes": 1}
