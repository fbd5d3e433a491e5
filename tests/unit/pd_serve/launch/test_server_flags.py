"""What an API server could not serve with is refused before instances are started."""

import subprocess
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.launch.engine_flags import parse
from pd_serve.launch.server_flags import check_loading, check_middleware, check_tls
from pd_serve.models import resolve


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate and its key, another key, and the key with a pass phrase."""
    folder = tmp_path_factory.mktemp("pem")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    for name in ("key", "other"):
        openssl("genpkey", *curve, "-out", name)
    openssl("pkey", "-in", "key", "-aes128", "-passout", "pass:secret", "-out", "locked")
    openssl("req", "-x509", "-key", "key", "-subj", "/CN=localhost", "-out", "cert")
    (folder / "text").write_text("no PEM")
    return folder


def flags(pem: Path, **given: Any) -> Namespace:
    settings: dict[str, Any] = dict.fromkeys(("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers"))
    found = {name: str(pem / value) if value in FILES else value for name, value in given.items()}
    return Namespace(**settings | {"ssl_cert_reqs": 0} | found)


FILES = ("cert", "key", "other", "locked", "text", "absent")
PAIR = {"ssl_certfile": "cert", "ssl_keyfile": "key"}


@pytest.mark.parametrize("given", [{}, PAIR, {**PAIR, "ssl_ca_certs": "cert", "ssl_cert_reqs": 2}])
def test_what_can_be_served_with_is_taken(pem: Path, given: dict[str, Any]) -> None:
    check_tls(flags(pem, **given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({**PAIR, "ssl_keyfile": "absent"}, "--ssl-keyfile: no such file"),
        ({**PAIR, "ssl_keyfile": "other"}, "certificate and its private key .*MISMATCH"),
        ({**PAIR, "ssl_keyfile": "locked"}, "pass phrase"),
        ({"ssl_certfile": "text"}, "--ssl-certfile, --ssl-keyfile: must be a certificate"),
        ({"ssl_certfile": "cert"}, "--ssl-certfile, --ssl-keyfile: must be a certificate"),
        ({"ssl_keyfile": "key"}, "--ssl-keyfile: needs --ssl-certfile"),
        ({"ssl_ca_certs": "cert"}, "--ssl-ca-certs: needs --ssl-certfile"),
        ({**PAIR, "ssl_ca_certs": "text"}, "--ssl-ca-certs: must be certificates"),
        ({**PAIR, "ssl_cert_reqs": 7}, "--ssl-cert-reqs: must be 0, 1 or 2"),
        ({**PAIR, "ssl_ciphers": "ROT13"}, "--ssl-ciphers: must be names"),
    ],
)
def test_what_cannot_be_served_with_is_refused(pem: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        check_tls(flags(pem, **given))


@pytest.mark.parametrize("name", ["nothing", "no.such.module", "os.path.nothing"])
def test_a_middleware_that_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"--middleware {name}: cannot be imported"):
        check_middleware(["os.path.join", name])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--ssl-certfile", "/absent"], "--ssl-certfile: no such file: /absent"),
        (["--middleware", "nothing"], "--middleware nothing: cannot be imported"),
        (["--default-chat-template-kwargs", "[1]"], "--default-chat-template-kwargs: must be a JSON object"),
        (["--allowed-origins", "5"], "--allowed-origins: must be a JSON list"),
    ],
)
def test_a_command_line_with_them_is_refused(given: list[str], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        parse(given, {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], None),
        (["--generation-config", "/absent"], "--generation-config: .*/absent"),
        (["--tokenizer-mode", "absent"], "--tokenizer, --tokenizer-mode: .*absent"),
        (["--tokenizer", "/absent"], "/absent"),
        (["--logging-config.pylogging_config_file", "/absent"], "File does not exist: /absent"),
    ],
)
def test_what_api_servers_load_is_loaded_before_instances_start(given: list[str], says: str | None) -> None:
    with pytest.raises(InvalidRequestError, match=says) if says is not None else nullcontext():
        check_loading(parse(given, {"model": resolve("tiny"), "dtype": "float32"}).server_config())
