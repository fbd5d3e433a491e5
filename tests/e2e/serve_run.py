"""`serve run` on a port of its own: `serve_run.py PORT NAME=VALUE...`.

The order is that of the command: the application is imported and built before Ray is started.
"""

import sys

from pd_serve.launch.ray_serve import build

if __name__ == "__main__":
    port, *arguments = sys.argv[1:]
    application = build(dict(argument.split("=", 1) for argument in arguments))

    import ray
    from ray import serve

    ray.init(address="local", include_dashboard=False, object_store_memory=80 * 2**20)
    serve.start(http_options={"port": int(port)})
    serve.run(application, blocking=True)
