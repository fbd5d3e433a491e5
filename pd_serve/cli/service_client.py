"""A running service over HTTP, and the operations on it that take more than one request."""

import time
from typing import Any
from urllib.parse import quote

import httpx

from pd_serve.errors import InvalidRequestError, MigrationRefusedError, PdServeError
from pd_serve.launch.console import Console
from pd_serve.launch.credentials import checked_key
from router.load import ROLES

#: Interval at which the progress of an operation is polled.
POLL_S = 0.5

TIMEOUT_S = 70.0


class ServiceClient:
    """The routes below `/cluster` of the service at a URL. All methods raise PdServeError with one line."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {checked_key(key)}"} if key else {}
        self._url = url.rstrip("/")
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    def get(self, path: str = "") -> dict[str, Any]:
        """`GET /cluster`, or a path below it."""
        return self._request("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """`POST /cluster/...`. Raises: MigrationRefusedError: the service refuses; says why."""
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        url = f"{self._url}/cluster" + (f"/{quote(path)}" if path else "")
        try:
            response = self._http.request(method, url, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PdServeError(f"no service at {self._url}: {error}") from error
        if response.is_error:
            refused = response.status_code in (404, 409)
            raise (MigrationRefusedError if refused else PdServeError)(_reason(response, self._url))
        try:
            answer: dict[str, Any] = response.json()
        except ValueError:
            raise PdServeError(f"{self._url} is not a pd-serve service: {url} answers no JSON") from None
        return answer


def _reason(response: httpx.Response, url: str) -> str:
    if response.status_code == 401:
        return f"{url} answers 401; give --api-key, or --admin-key if it has one"
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{url} answers {response.status_code}"


def parse_sizes(texts: list[str]) -> dict[str, int]:
    """Sizes by role from "ROLE=N". Raises: InvalidRequestError."""
    sizes = {}
    for text in texts:
        role, _, size = text.partition("=")
        if not role or not size.isdecimal():
            raise InvalidRequestError(f"{text!r}: must be ROLE=N, such as decode=4")
        if role not in ROLES:
            raise InvalidRequestError(f"no role {role!r}; there are {', '.join(ROLES)}")
        if role in sizes:
            raise InvalidRequestError(f"{text!r}: {role} is given twice")
        sizes[role] = int(size)
    return sizes


def drain_node(service: ServiceClient, console: Console, node: str, *, wait_s: float) -> None:
    """Drains all instances of a machine, before it goes away.

    Returns when none of them has a request any more, or after `wait_s` seconds. An instance that the service
    cannot do without is not drained.

    Args:
        node: The machine's host name, as `GET /cluster` has it.
    """
    deadline = time.monotonic() + wait_s
    ids = [row["id"] for row in service.get()["instances"] if row["node"] == node]
    console.step(f"{node}: {', '.join(ids) or 'no instances'}")
    drained = [instance for instance in ids if _is_drained(service, console, instance)]
    while busy := _requests(service, drained):
        if time.monotonic() > deadline:
            console.warn(f"{node} still has {busy} requests")
            return
        time.sleep(POLL_S)
    if drained:
        console.step(f"{', '.join(drained)}: empty")


def _is_drained(service: ServiceClient, console: Console, instance: str) -> bool:
    try:
        service.post("drain", {"instance": instance})
    except MigrationRefusedError as refusal:
        console.warn(f"{instance} is not drained: {refusal}")
        return False
    return True


def _requests(service: ServiceClient, ids: list[str]) -> int:
    if not ids:
        return 0
    rows = [row for row in service.get()["instances"] if row["id"] in ids]
    return sum(row["running"] + row["waiting"] for row in rows)


def restart(service: ServiceClient, console: Console) -> None:
    """Returns when all instances are new ones. Raises: PdServeError: the service gave it up."""
    before = {row["id"] for row in service.get()["instances"] if row["pid"]}
    service.post("restart", {})
    shown = ""
    while True:
        time.sleep(POLL_S)
        cluster = service.get()
        state = cluster["restart"]
        if state is None:  # this API server is new and has no report of the manager yet
            continue
        if state["progress"] != shown:
            shown = state["progress"]
            console.step(f"restart: {shown}")
        if not state["running"] and shown:
            break
    if left := before & {row["id"] for row in cluster["instances"]}:
        raise PdServeError(f"still there: {', '.join(sorted(left))}; see pd-serve status")
