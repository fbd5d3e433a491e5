"""Whether a move is worth it: it has to leave the less free one of the pair freer than it was.

Under constant load every such move makes the sorted list of all instances' room greater, so moves come to
an end, and no request goes back and forth. (What is on its way already counts with an average size: what
that gets wrong, later rounds see.) The paper's rule has no such check: two instances on either side of the
threshold can pass one request to each other for ever.
"""

from router.freeness import freeness, virtual_usage
from router.load import InstanceLoad

#: How much freer, in blocks per request. Half a block is filled by eight decode steps: by less, moving
#: would be undone soon.
MIN_GAIN = 0.5


def room(load: InstanceLoad) -> float:
    """Freeness where there are free blocks; where too few, how many are missing in all.

    Shared among the batch, what is missing would look worse the fewer requests there are: a move away
    from an overcommitted instance could never be right.
    """
    return min(freeness(load), load.total_blocks - virtual_usage(load))


def has_space(load: InstanceLoad, num_blocks: int) -> bool:
    return load.free_blocks - load.expected_blocks - load.watermark_blocks >= num_blocks


def improves(source: InstanceLoad, destination: InstanceLoad, num_blocks: int) -> bool:
    """Whether a request of so many blocks makes the pair better off by going."""
    before = min(room(source), room(destination))
    after = min(room(source.with_departures(num_blocks)), room(destination.with_arrivals(num_blocks)))
    return has_space(destination, num_blocks) and after >= before + MIN_GAIN
