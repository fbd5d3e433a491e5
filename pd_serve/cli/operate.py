"""`pd-serve drain`, `scale`, `restart`: what `POST /cluster/...` does, from the command line."""

import time
from typing import Any

import httpx

from pd_serve.errors import InvalidRequestError, PdServeError
from pd_serve.launch.console import Console
from router.load import ROLES

#: How often the progress of a restart is looked at.
POLL_S = 0.5

TIMEOUT_S = 70.0


class RefusedError(PdServeError):
    """The service answers, and does not do it; the message says why."""


class ServiceClient:
    """A running service, by its URL."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url.rstrip("/")
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    def get(self) -> dict[str, Any]:
        """`GET /cluster`. Raises: PdServeError."""
        return self._ask("GET", "/cluster")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """`POST /cluster/...`. Raises: PdServeError: the service does not; says why."""
        return self._ask("POST", f"/cluster/{path}", body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, self._url + path, json=body)
        except httpx.HTTPError as error:
            raise PdServeError(f"no service at {self._url}: {error}") from error
        if response.is_error:
            refused = response.status_code in (404, 409)
            raise (RefusedError if refused else PdServeError)(_reason(response, self._url))
        answer: dict[str, Any] = response.json()
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
            raise InvalidRequestError(f"{text!r}: it has to be ROLE=N, such as decode=4")
        if role not in ROLES:
            raise InvalidRequestError(f"no role {role!r}; there are {', '.join(ROLES)}")
        sizes[role] = int(size)
    return sizes


def drain(service: ServiceClient, console: Console, instance: str, *, stop: bool, undo: bool) -> None:
    service.post("drain", {"instance": instance, "stop": stop, "draining": not undo})
    what = "is used again" if undo else "is drained, and stopped when it is empty" if stop else "is drained"
    console.step(f"{instance} {what}; see pd-serve status")


def drain_node(service: ServiceClient, console: Console, node: str, *, wait_s: float) -> None:
    """Drains all instances of a machine, before it goes away.

    Returns when none of them has a request any more, or after `wait_s` seconds. What cannot be done without
    is not drained.

    Args:
        node: The machine's host name, as `GET /cluster` has it.

    Raises:
        PdServeError: The service does not answer.
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
    except RefusedError as refusal:
        console.warn(f"{instance} is not drained: {refusal}")
        return False
    return True


def _requests(service: ServiceClient, ids: list[str]) -> int:
    if not ids:
        return 0
    rows = [row for row in service.get()["instances"] if row["id"] in ids]
    return sum(row["running"] + row["waiting"] for row in rows)


def scale(service: ServiceClient, console: Console, sizes: dict[str, int]) -> None:
    service.post("scale", sizes)
    shown = ", ".join(f"{role}={size}" for role, size in sizes.items())
    console.step(f"on its way to {shown}; see pd-serve status")


def restart(service: ServiceClient, console: Console) -> None:
    """Returns when all instances are new ones. Raises: PdServeError: it was given up."""
    before = {row["id"] for row in service.get()["instances"] if row["pid"]}
    service.post("restart", {})
    shown = ""
    while True:
        time.sleep(POLL_S)
        cluster = service.get()
        state = cluster["restart"]
        if state["progress"] != shown:
            shown = state["progress"]
            console.step(f"restart: {shown}")
        if not state["running"] and shown:
            break
    if left := before & {row["id"] for row in cluster["instances"]}:
        raise PdServeError(f"still there: {', '.join(sorted(left))}; see pd-serve status")
