"""Benchmarks: what is compared is measured in one run on one machine, in turns."""
