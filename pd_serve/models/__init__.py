"""Models by name: `resolve` turns a name into the model that vLLM loads, and builds demo models once."""

from pd_serve.models.catalog import DEFAULT_MODEL, default_dtype, demo_names, resolve, served_name

__all__ = ["DEFAULT_MODEL", "default_dtype", "demo_names", "resolve", "served_name"]
