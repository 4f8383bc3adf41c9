"""Observers of encodes for tests."""

from visionaccel.backends import hookimpl


class Told:
    """Keeps every report: `encoded`, `failed`, `compared` and `breakers`, in their order."""

    def __init__(self):
        self.encoded, self.failed, self.compared, self.breakers = [], [], [], []

    @hookimpl
    def visionaccel_encoded(self, report):
        self.encoded.append(report)

    @hookimpl
    def visionaccel_failed(self, report):
        self.failed.append(report)

    @hookimpl
    def visionaccel_compared(self, report):
        self.compared.append(report)

    @hookimpl
    def visionaccel_breaker(self, report):
        self.breakers.append(report)
