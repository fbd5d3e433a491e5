"""The paper's points, from the project's file or another one."""

from pathlib import Path

import pytest

from loadtests.experiments.paper_points import PaperPoints
from pd_serve.errors import InvalidRequestError
from tests.unit.loadtests.experiments.made_figures import PAPER


def test_the_project_has_the_points_of_every_compared_figure() -> None:
    paper = PaperPoints.read(None)

    assert paper.values("fig10_migration", "seq_len") == [256, 512, 1024, 2048, 4096, 8192]
    for figure in ("fig11", "fig13", "fig14", "fig15"):
        assert any(name.startswith(figure) for name in paper.points)


def test_an_unreadable_reference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        PaperPoints.read(path)
    path.write_text("[]")
    with pytest.raises(InvalidRequestError, match="no points by name"):
        PaperPoints.read(path)


def test_unknown_names_have_no_points() -> None:
    assert PaperPoints().values("a", "b") == []
    assert PAPER.curve("fig13_priorities", "HighPriority", "Llumnix", x="cv", y="Request P99") == {}
    assert PAPER.curve("fig13_priorities", "HighPriority", "Llumnix", x="cv", y="Request Mean") == {2.0: 5.7}
