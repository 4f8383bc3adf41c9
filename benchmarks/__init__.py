"""Measurements, not tests: each prints figures of one run, the ratios of which can be compared between machines."""
