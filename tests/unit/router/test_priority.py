"""The class of a priority."""

import pytest

from router.priority import PriorityClass, priority_class


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        (-100, PriorityClass.HIGH),
        (-1, PriorityClass.HIGH),
        (0, PriorityClass.NORMAL),
        (7, PriorityClass.NORMAL),
    ],
)
def test_priorities_below_the_default_are_high(priority: int, expected: PriorityClass) -> None:
    assert priority_class(priority) is expected


def test_classes_are_in_the_order_of_service_and_have_the_names_of_the_reports() -> None:
    assert [one.label for one in sorted(PriorityClass)] == ["high", "normal"]
