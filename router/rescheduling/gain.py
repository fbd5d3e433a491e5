"""Whether a move is worth it: the less free instance of the pair has to be freer afterwards.

Under constant load each such move raises the sorted list of all instances' freeness, so moves come to an end
and no request goes back and forth. (Requests that are on their way count with an average size; later rounds
correct the error.) The paper's rule has no such check: two instances on either side of the threshold can pass
one request to each other for ever.
"""

from router.freeness import freeness, virtual_usage
from router.load import InstanceLoad

#: Least gain, in blocks per request. Eight decode steps fill half a block and undo a smaller gain.
MIN_GAIN = 0.5


def freeness_or_deficit(load: InstanceLoad) -> float:
    """Freeness of an instance with free blocks; for one without, the number of missing blocks, negative.

    Divided by the batch, the missing blocks would look worse the fewer requests there are: a move away from
    an overcommitted instance could never be worth it.
    """
    return min(freeness(load), load.total_blocks - virtual_usage(load))


def has_free_blocks(load: InstanceLoad, num_blocks: int) -> bool:
    return load.free_blocks - load.expected_blocks - load.watermark_blocks >= num_blocks


def freeness_after_move(source: InstanceLoad, destination: InstanceLoad, num_blocks: int) -> float:
    """Freeness of the less free instance of the pair once a request of this size has moved."""
    return min(
        freeness_or_deficit(source.with_departures(num_blocks)),
        freeness_or_deficit(destination.with_arrivals(num_blocks)),
    )


def is_worth_moving(source: InstanceLoad, destination: InstanceLoad, num_blocks: int) -> bool:
    """Whether a request of this size fits the destination and leaves the pair better off."""
    before = min(freeness_or_deficit(source), freeness_or_deficit(destination))
    after = freeness_after_move(source, destination, num_blocks)
    return has_free_blocks(destination, num_blocks) and after >= before + MIN_GAIN
