"""A cluster in virtual time whose processes, network and operators fail by a schedule drawn from a seed."""
