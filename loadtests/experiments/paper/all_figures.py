"""All figures by their number in the paper, and `experiments paper`."""

from collections.abc import Sequence

from loadtests.experiments.figure import Figure, FigureOptions
from loadtests.experiments.figure_files import run_figures
from loadtests.experiments.paper import autoscaling, fragmentation, migration, priorities, scheduling, serving
from loadtests.experiments.result_store import ExperimentRun
from pd_serve.errors import InvalidRequestError

FIGURES: dict[int, Figure] = {
    figure.number: figure
    for figure in (
        migration.FIGURE,
        serving.FIGURE,
        fragmentation.FIGURE,
        priorities.FIGURE,
        autoscaling.AUTOSCALING,
        autoscaling.SWEEP,
        scheduling.FIGURE,
    )
    if figure.number is not None
}


def run_paper(numbers: Sequence[int], options: FigureOptions, run: ExperimentRun) -> None:
    """Runs figures by number, or all.

    Raises:
        InvalidRequestError: There is no such figure.
        PdServeError: Simulations failed; the others are kept.
    """
    unknown = sorted(set(numbers) - FIGURES.keys())
    if unknown:
        raise InvalidRequestError(f"no figure {unknown[0]}: there are {', '.join(map(str, FIGURES))}")
    figures = [FIGURES[number] for number in sorted(set(numbers)) or FIGURES]
    run_figures(figures, options, run, "provenance.json")
