"""The OpenAI front end: vLLM's own serving layer on an engine client that spans the cluster.

Nothing is imported here, so that naming the package costs nothing: `app`, `engine_client` and `server`
import vLLM (seconds of CPU) and are imported by the process that serves, when it is about to.
"""
