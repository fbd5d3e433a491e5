"""The summary of the benchmark of the engine's step."""

from loadtests.bench.step import ARRIVING, LEAVING, REST, summary
from loadtests.bench.step_arms import OURS, STOCK
from loadtests.bench.step_clock import RecordedStep


def steps(*ms: float) -> list[RecordedStep]:
    return [RecordedStep(256, 256, one, one / 2, one) for one in ms]


def test_ratios_are_medians_over_the_rounds_of_ratios_of_medians() -> None:
    def rounds(*of_rest: list[RecordedStep]) -> list[dict[str, list[RecordedStep]]]:
        return [{REST: rest, ARRIVING: steps(10), LEAVING: steps(10)} for rest in of_rest]

    measured = {
        OURS: rounds(steps(20, 22, 90), steps(30), steps(99)),
        STOCK: rounds(steps(20), steps(20), steps(20)),
    }

    rest = summary(measured)["parts"][REST]

    assert (rest["ms"]["ratio"], rest["ms"]["ratios"]) == (1.5, [1.1, 1.5, 4.95])
    assert (rest["ms"][OURS], rest["ms"][STOCK], rest["thread_ms"][OURS]) == (30, 20, 15)
    assert rest["steps"] == {OURS: 5, STOCK: 3}
