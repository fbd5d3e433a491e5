"""Running on a Ray cluster with Ray Serve, and setting up the environment."""
