"""Stock vLLM 0.32 as a migrating engine: plugged in through public interfaces, nothing patched."""
