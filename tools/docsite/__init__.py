"""Generates tables of the documentation from the package."""
