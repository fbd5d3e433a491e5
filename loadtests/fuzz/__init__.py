"""Sends mutated frames to every listening socket of a running cluster."""
