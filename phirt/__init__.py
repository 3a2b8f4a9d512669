"""Runs small language models on whatever accelerator a machine has."""
