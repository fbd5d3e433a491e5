"""Kills and freezes processes of a running cluster while streams go on, and compares every token."""
