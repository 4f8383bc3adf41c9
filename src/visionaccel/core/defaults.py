"""What holds unless a setting or an argument says otherwise. Apart from the settings, whose import takes 30 ms."""

LONGEST_SECONDS = 86_400.0
"""The longest time that a setting takes, a day: systems cannot wait for any number of seconds."""

DEADLINE, OPEN_DEADLINE = 120.0, 600.0
"""Seconds for an image, and for opening a program."""

QUEUE_SIZE, CACHE_SIZE = 64, 512 * 2**20
"""Items that may wait for a device, and bytes of embeddings that are kept."""
