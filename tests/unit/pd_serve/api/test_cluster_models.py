"""The OpenAPI document describes `/cluster` as it is."""

from typing import Any

import pytest
from fastapi import FastAPI

from pd_serve.api import cluster_routes
from pd_serve.api.cluster_models import TimelineResponse
from pd_serve.frontend.snapshot import ClusterSnapshot, InstanceSnapshot
from pd_serve.observe.recorder import RequestRecorder
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

    assert all("requestBody" in post for post in posts.values())
    assert {"400", "409"} <= posts["/cluster/scale"]["responses"].keys()
    assert "202" in posts["/cluster/drain"]["responses"]


def test_the_schema_of_a_snapshot_is_that_of_its_struct(paths: dict[str, Any]) -> None:
    schema = paths["/cluster"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]

    assert set(schema["properties"]) == set(ClusterSnapshot.__struct_fields__)
    row = schema["properties"]["instances"]["items"]
    assert set(row["properties"]) == set(InstanceSnapshot.__struct_fields__)
    assert "$ref" not in str(schema)


def test_a_timeline_has_the_fields_of_its_model() -> None:
    recorder = RequestRecorder()
    recorder.issued("x", 1.0, NewRequest(10, 0, ()))
    [found] = recorder.find("x")

    assert TimelineResponse.model_validate(found).state == "waiting"
    assert {"state", "stages", "migrations"} <= TimelineResponse.model_fields.keys() & found.keys()
