"""The OpenAPI document describes `/cluster` as it is."""

from typing import Any

import pytest
from fastapi import FastAPI

from pd_serve.api import cluster_routes
from pd_serve.api.cluster_models import InstanceResponse, TimelineResponse
from pd_serve.comm.membership import InstanceInfo
from pd_serve.frontend.snapshot import instance_row
from pd_serve.observe.recorder import RequestRecorder
from router.load import InstanceLoad
from router.request import NewRequest


@pytest.fixture(scope="module")
def paths() -> dict[str, Any]:
    app = FastAPI()
    app.include_router(cluster_routes.router)
    return dict(app.openapi()["paths"])


def test_every_response_has_a_schema(paths: dict[str, Any]) -> None:
    for methods in paths.values():
        for operation in methods.values():
            statuses = operation["responses"].keys()
            assert {"200", "202"} & statuses
            assert "401" in statuses
            for status, answer in operation["responses"].items():
                assert answer["content"]["application/json"]["schema"], (operation["operationId"], status)


def test_every_post_has_a_body_and_its_errors(paths: dict[str, Any]) -> None:
    posts = {path: methods["post"] for path, methods in paths.items() if "post" in methods}

    assert {path for path, post in posts.items() if "requestBody" not in post} == {"/cluster/restart"}
    assert {"400", "409"} <= posts["/cluster/scale"]["responses"].keys()
    assert "202" in posts["/cluster/drain"]["responses"]


def test_a_snapshot_of_an_instance_has_the_fields_of_its_model() -> None:
    info = InstanceInfo("d0", "decode", "", "node", 1, None, ["generate"], 8192, 10, 16)
    starting, idle = (
        instance_row(info, None),
        instance_row(info, InstanceLoad("d0", "decode", total_blocks=10, free_blocks=10)),
    )

    for row in (starting, idle | {"freeness": None}):  # as the route writes an infinity
        assert InstanceResponse.model_validate(row).model_extra == {}


def test_a_timeline_has_the_fields_of_its_model() -> None:
    recorder = RequestRecorder()
    recorder.issued("x", 1.0, NewRequest(10, 0, ()))
    [found] = recorder.find("x")

    assert TimelineResponse.model_validate(found).state == "waiting"
    assert {"state", "stages", "migrations"} <= TimelineResponse.model_fields.keys() & found.keys()
