"""Builders that others wrote, each run in a Python of its own."""
