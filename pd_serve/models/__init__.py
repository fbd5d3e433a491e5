"""Models by name: `resolve` turns a name into what vLLM loads, and makes the demo models on first use."""

from pd_serve.models.catalog import DEFAULT_MODEL, default_dtype, demo_names, resolve, served_name

__all__ = ["DEFAULT_MODEL", "default_dtype", "demo_names", "resolve", "served_name"]
