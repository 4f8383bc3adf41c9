"""Measurements that the command `visionaccel bench` takes: loads, figures of their time stamps, and pictures."""
