"""What the service tells of itself: each request's timeline, metrics, log lines and traces made from it."""
