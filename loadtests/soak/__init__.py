"""Mixed load for a long time: memory, descriptors, threads and tables of all processes have to stay flat."""
