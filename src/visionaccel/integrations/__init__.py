"""Faces towards other projects."""
