"""Which layout of GPUs suits a workload; see docs/planning.md."""
