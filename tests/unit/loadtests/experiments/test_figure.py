"""Options of figures."""

import pytest

from loadtests.experiments.figure import FigureOptions
from pd_serve.errors import InvalidRequestError
from tests.unit.loadtests.experiments.made_figures import ALL, ENDS, options


def test_options_select_points_of_a_curve() -> None:
    assert options(rates=ALL).pick([1, 2, 3]) == [1, 2, 3]
    assert options(rates=ENDS).pick([1, 2, 3]) == [1, 3]
    assert options(rates=frozenset({"last"})).pick([1, 2, 3]) == [3]
    with pytest.raises(InvalidRequestError, match="--rates middle"):
        FigureOptions.parse(10, "middle", 0, None)
