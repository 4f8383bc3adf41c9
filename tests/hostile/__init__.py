"""Hostile input for everything that reads files of strangers, in processes that may crash, hang or run out of memory.

`python -m hostile` runs it and prints a table; `test_hostile.py` runs a smaller share. An input may be refused by an
error of visionaccel, or read. Whatever else happens is a finding, and its files are kept.
"""
