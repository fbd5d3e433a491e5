"""Load tests with Locust, faults in real processes, benchmarks and experiments.

A load test measures what the users of a service see and checks every stream token by token. Only
`locustfile` and the modules that it alone imports use Locust, which patches its process for gevent; it runs
in a process of its own.
"""
