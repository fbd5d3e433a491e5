"""Measurements on this machine: `pd-serve bench migration|overhead|profile|simulator`."""
