"""Which process takes the next instance."""

from pd_serve.manager.instance_processes import InstanceProcesses


def started(processes: InstanceProcesses, *names: str) -> list[str]:
    """Starts instances, in a new process where none has a place. Returns the process of each."""
    for name in names:
        if not processes.place(name):
            processes.add(name, processes.name_of_new(name), object())
    return [processes[name].name for name in names]


def test_an_only_instance_gives_its_process_its_name() -> None:
    processes = InstanceProcesses(1)

    assert started(processes, "decode-0", "decode-1") == ["decode-0", "decode-1"]


def test_instances_fill_one_process_after_the_other() -> None:
    processes = InstanceProcesses(2)

    assert started(processes, "p-0", "d-0", "d-1") == [
        "process-of-p-0",
        "process-of-p-0",
        "process-of-d-1",
    ]
    assert [process.instances for process in processes] == [{"p-0", "d-0"}, {"d-1"}]


def test_a_process_that_an_instance_has_left_takes_no_other_one() -> None:
    processes = InstanceProcesses(3)
    started(processes, "d-0", "d-1")

    left = processes.remove("d-0")

    assert left is not None
    assert left.instances == {"d-1"}
    assert started(processes, "d-2") == ["process-of-d-2"]


def test_a_rolling_restart_replaces_all_processes() -> None:
    processes = InstanceProcesses(2)
    before = set(started(processes, "d-0", "d-1", "d-2", "d-3"))

    for old, new in enumerate(range(4, 8)):
        started(processes, f"d-{new}")
        processes.remove(f"d-{old}")

    assert not before & {process.name for process in processes}
    assert len(list(processes)) == 2


def test_a_found_process_takes_no_further_instance() -> None:
    processes = InstanceProcesses(4)
    processes.found("process-of-d-0", object(), ["d-0", "d-1"])

    assert started(processes, "d-2") == ["process-of-d-2"]
    assert len(processes.clear()) == 2
    assert not list(processes)


def test_an_unknown_instance_has_no_process() -> None:
    assert InstanceProcesses(2).remove("d-0") is None
