"""Default values of settings and arguments. Not in `settings`, whose import takes 30 ms."""

LONGEST_SECONDS = 86_400.0
"""The longest time that a setting may name, a day: systems cannot wait for arbitrarily many seconds."""

DEADLINE, OPEN_DEADLINE = 120.0, 600.0
"""Seconds for an image, and for opening a program."""

QUEUE_SIZE, CACHE_SIZE = 64, 512 * 2**20
"""The maximum number of items that wait for a device, and of bytes in the cache of embeddings."""
