"""Experiments in virtual time: many simulations with the real control plane, as tables and plots."""
