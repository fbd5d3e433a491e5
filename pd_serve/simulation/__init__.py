"""The whole control plane on simulated engines, in virtual time; see docs/simulation.md."""
