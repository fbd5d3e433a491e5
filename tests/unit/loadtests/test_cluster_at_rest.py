"""A cluster at rest."""

from loadtests.cluster_at_rest import missing_instances, not_at_rest
from tests.unit.loadtests.chaos.made_run import cluster, instance


def test_pools_have_to_have_their_sizes() -> None:
    wanted = {"decode": 1}

    assert missing_instances(cluster(instance()), wanted) == []
    assert missing_instances(cluster(), wanted) == ["decode: 1 instances wanted, there are: none"]
    assert missing_instances(cluster(instance(), instance()), wanted)
    assert missing_instances(cluster(instance(state="draining")), wanted)
    assert missing_instances(cluster(instance(), restart={"running": True}), wanted)
    assert missing_instances({}, wanted)


def test_a_cluster_at_rest_holds_nothing() -> None:
    assert not_at_rest(cluster(instance())) == []
    assert not_at_rest(cluster(instance(running=2, free_blocks=90))) == [
        "decode-0: 2 running and 0 waiting requests",
        "decode-0: 10 blocks are held",
    ]
