"""Which key opens which path."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from pd_serve.api.identity import IdentityMiddleware
from pd_serve.api.keys import KeyAccounts, KeyMiddleware

OPEN = [
    "/health",
    "/ping",
    "/load",
    "/version",
    "/metrics",
    "/openapi.json",
    "/dashboard",
    "/dashboard/page.js",
]
GUARDED = ["/v1/models", "/tokenize", "/invocations", "/", "/healthy", "/metricsx", "/v1/health"]
ADMIN = ["/cluster", "/cluster/drain", "/cluster/requests/x"]


def client(api_keys: list[str], admin_key: str | None = None) -> TestClient:
    return TestClient(KeyMiddleware(PlainTextResponse("in"), api_keys=api_keys, admin_key=admin_key))


def status(client: TestClient, path: str, key: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return client.get(path, headers=headers).status_code


@pytest.mark.parametrize("path", OPEN + GUARDED + ADMIN)
def test_without_keys_everything_is_open(path: str) -> None:
    assert status(client([]), path) == 200


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("key", [None, "wrong"])
def test_what_is_open_by_design(path: str, key: str | None) -> None:
    assert status(client(["one"], "admin"), path, key) == 200


@pytest.mark.parametrize("path", GUARDED)
def test_api_keys(path: str) -> None:
    keys = {None: 401, "wrong": 401, "one": 200, "two": 200, "admin": 401}

    assert {key: status(client(["one", "two"], "admin"), path, key) for key in keys} == keys


@pytest.mark.parametrize("path", ADMIN)
def test_the_admin_key_replaces_the_api_keys_for_the_cluster(path: str) -> None:
    keys = {None: 401, "one": 401, "admin": 200}

    assert {key: status(client(["one"], "admin"), path, key) for key in keys} == keys


@pytest.mark.parametrize("path", ADMIN)
def test_without_an_admin_key_the_api_keys_open_the_cluster(path: str) -> None:
    keys = {None: 401, "wrong": 401, "one": 200}

    assert {key: status(client(["one"]), path, key) for key in keys} == keys


def test_an_admin_key_alone_leaves_the_api_open() -> None:
    only_admin = client([], "admin")

    assert (status(only_admin, "/v1/models"), status(only_admin, "/cluster")) == (200, 401)


@pytest.mark.parametrize(
    "header", ["", "one", "Basic one", "Bearer", "Bearer ", "Bearer one ", "Bearer one two", "Bearer ONE"]
)
def test_only_a_bearer_s_exact_key_opens(header: str) -> None:
    answer = client(["one"]).get("/v1/models", headers={"Authorization": header})

    assert answer.status_code == 401
    assert answer.json() == {"error": "Unauthorized"}
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_browser_may_ask_what_it_may_ask() -> None:
    """CORS: the question comes before the key."""
    assert client(["one"]).options("/v1/models").status_code == 200


def test_a_prefix_of_the_server_does_not_open() -> None:
    behind = TestClient(
        KeyMiddleware(PlainTextResponse("in"), api_keys=["one"], admin_key=None), root_path="/api"
    )

    assert behind.get("/api/v1/models").status_code == 401
    assert behind.get("/api/health").status_code == 200


def test_a_refusal_is_as_plain_vllm_s() -> None:
    guarded = AuthenticationMiddleware(PlainTextResponse("in"), ["one"])

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        await guarded(scope, receive, send)

    theirs, ours = TestClient(vllm).get("/v1/models"), client(["one"]).get("/v1/models")

    assert (ours.status_code, ours.json()) == (theirs.status_code, theirs.json())
    assert ours.status_code == 401


# ---- accounts


async def account_of(accounts: KeyAccounts, authorization: str | None) -> int:
    """The account of an HTTP request."""
    found: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(accounts.current())

    async def unused(*_: object) -> Message:
        raise AssertionError

    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    await IdentityMiddleware(app)({"type": "http", "headers": headers}, unused, unused)
    return found[0]


async def test_a_key_has_an_account_of_its_own() -> None:
    accounts = KeyAccounts(["sk-a", "sk-b", "sk-c"])

    assert [await account_of(accounts, f"Bearer sk-{name}") for name in "cab"] == [2, 0, 1]
    assert await account_of(accounts, "bearer sk-b") == 1


@pytest.mark.parametrize("authorization", [None, "", "Bearer anything", "Basic x", "Bearer"])
async def test_without_keys_all_clients_have_one_account(authorization: str | None) -> None:
    assert await account_of(KeyAccounts([]), authorization) == 0


def test_no_account_shows_its_key() -> None:
    accounts = KeyAccounts(["sk-secret"])

    assert "sk-secret" not in f"{accounts!r}{vars(accounts)!r}"
