"""Load tests with Locust: what users of the service see, every stream checked token by token.

Only `locustfile` and what it alone imports know Locust, which patches the process (gevent): it runs in a
process of its own. All decisions are in modules without it.
"""
