"""A Ray cluster on this machine until SIGTERM: `local_ray.py JSON...`, a node with such options for each.

Run as a process: Ray's cluster utility changes the environment that it is used in. Without `ray start`, which
starts much that no test needs. Prints the address.
"""

import json
import signal
import sys

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}

if __name__ == "__main__":
    head, *others = [NODE | json.loads(argument) for argument in sys.argv[1:]]
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    for node in others:
        cluster.add_node(**node)
    print(f"address {cluster.address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    cluster.shutdown()
