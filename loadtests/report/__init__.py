"""The report of a load test: samples of the cluster, plots, one HTML page, lines for a terminal."""
