"""`deploy.app:build`, the import path of a checkout. The application is `pd_serve.launch.ray_serve`."""

from pd_serve.launch.ray_serve import build

__all__ = ["build"]
