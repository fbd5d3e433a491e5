"""Benchmarks as ratios measured side by side in one run: `pd-serve bench migration|overhead`."""
