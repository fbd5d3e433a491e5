"""The picture of a plan."""

import xml.etree.ElementTree as ElementTree

from pd_serve.planning.fast_cluster import Layout
from pd_serve.planning.picture import svg
from pd_serve.planning.search import Goal, LayoutPlan
from router.slo import Slo

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_has_a_line_and_a_label_for_each_layout() -> None:
    plans = [
        LayoutPlan(Layout(0, 1, 3, 2048), 12.0, [(8.0, 1.0), (12.0, 0.9), (16.0, 0.2)]),
        LayoutPlan(Layout(neutral=4, chunk_tokens=512), 9.0, [(9.0, 0.95), (11.0, 0.5)]),
    ]

    picture = ElementTree.fromstring(svg(plans, Goal(Slo()), "a <trace> & more"))

    lines = picture.findall(f"{SVG}polyline")
    assert sorted(len(line.attrib["points"].split()) for line in lines) == [2, 3]
    texts = [text.text for text in picture.findall(f"{SVG}text")]
    assert {"a <trace> & more", "1 prefill + 3 decode, chunk 2048: 12/s", "10"} <= set(texts)
