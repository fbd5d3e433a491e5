"""Stock vLLM 0.32 as a migrating engine: plugged in through public seams, nothing patched.

engine.py      VllmEngine: vLLM's EngineCore stepped in a thread of ours
scheduler.py   one mixin over both of vLLM's scheduler classes
worker.py      what has to be done beside the model runner (state, random generators, KV memory)
support.py     which engines and requests can move; the private names we rely on
"""
