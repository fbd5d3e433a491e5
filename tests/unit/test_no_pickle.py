"""Nothing turns bytes from a socket into code."""

import ast
import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import CUSTOM_TYPE_CLOUDPICKLE, CUSTOM_TYPE_PICKLE, MsgpackDecoder

from migration.messages import AnyMigrationMessage
from migration.transport.nixl import _NixlEndpoint
from pd_serve.comm.messages import ToApiServer, ToInstance, TokenHeader, ToManager, ToScheduler
from pd_serve.comm.requests import Call, CallEngine

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for package in ("pd_serve", "migration", "router", "deploy", "loadtests")
    for path in (ROOT / package).rglob("*.py")
)

#: Modules that turn bytes into objects of any class, and calls that turn text into code.
MODULES = {"pickle", "_pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"}

#: Objects go over a socket pair there, between a process and the child that it has started.
BETWEEN_PARENT_AND_CHILD = "pd_serve/launch/child_channel.py"

OUR_DECODERS = {
    "to an instance": msgspec.msgpack.Decoder(ToInstance),
    "to an API server": msgspec.msgpack.Decoder(ToApiServer),
    "to the scheduler": msgspec.msgpack.Decoder(ToScheduler),
    "to the manager": msgspec.msgpack.Decoder(ToManager),
    "between llumlets": msgspec.msgpack.Decoder(AnyMigrationMessage),
    "header of tokens": msgspec.msgpack.Decoder(TokenHeader),
    "where KV blocks are": msgspec.msgpack.Decoder(_NixlEndpoint),
}


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            found.append(ast.unparse(node.func))
    return found


def encoded(struct: type[msgspec.Struct], **values: Any) -> bytes:
    """An array-like struct of vLLM's with raw msgpack in some of its fields."""
    names = [field.name for field in msgspec.structs.fields(struct)]
    fixed = {"request_id": "r", "arrival_time": 0.0, "new_token_ids": [], **values}
    row = []
    for field in msgspec.structs.fields(struct):
        default = None if field.default is msgspec.NODEFAULT else field.default
        row.append(fixed.get(field.name, default))
    return msgspec.msgpack.encode(row[: max(names.index(name) for name in values) + 1])


# ---- our code


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_of_ours_runs_bytes(path: Path) -> None:
    expected = ["pickle"] if path == ROOT / BETWEEN_PARENT_AND_CHILD else []
    assert dangers(path.read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from cloudpickle import loads", "import marshal as m", "eval('1')", "torch.load(f)"],
)
def test_the_check_finds_what_it_looks_for(line: str) -> None:
    assert dangers(f"def f():\n    {line}") != []


def test_nobody_allows_vllm_to_unpickle() -> None:
    assert [path for path in SOURCES if "VLLM_ALLOW_INSECURE_SERIALIZATION" in path.read_text("utf-8")] == []


# ---- vLLM's decoders, as we use them


@pytest.mark.parametrize("code", [CUSTOM_TYPE_PICKLE, CUSTOM_TYPE_CLOUDPICKLE])
def test_a_pickle_in_a_request_or_its_tokens_is_refused(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    folder = tmp_path / "made"
    bomb = msgspec.msgpack.Ext(code, pickle.dumps(Bomb(folder)))
    request = encoded(EngineCoreRequest, reasoning_parser_kwargs={"x": bomb})
    output = msgspec.msgpack.decode(encoded(EngineCoreOutput, kv_transfer_params={"x": bomb}))
    outputs = encoded(EngineCoreOutputs, outputs=[output])

    with pytest.raises(NotImplementedError, match=f"Extension type code {code}"):
        MsgpackDecoder(EngineCoreRequest).decode([request])
    with pytest.raises(NotImplementedError, match=f"Extension type code {code}"):
        MsgpackDecoder(EngineCoreOutputs).decode([outputs])
    assert not folder.exists()


def test_what_is_refused_is_refused_for_the_pickle_in_it() -> None:
    """The same messages with a number in its place are understood."""
    request = MsgpackDecoder(EngineCoreRequest).decode(
        [encoded(EngineCoreRequest, reasoning_parser_kwargs={"x": 1})]
    )
    output = msgspec.msgpack.decode(encoded(EngineCoreOutput, kv_transfer_params={"x": 1}))
    outputs = MsgpackDecoder(EngineCoreOutputs).decode([encoded(EngineCoreOutputs, outputs=[output])])

    assert request.reasoning_parser_kwargs == {"x": 1}
    assert outputs.outputs[0].kv_transfer_params == {"x": 1}


def test_a_name_of_a_class_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's utility results may name a class to make; only with insecure serialization."""
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    result = [["subprocess", "Popen"], ["true"]]

    with pytest.raises((TypeError, msgspec.MsgspecError), match="VLLM_ALLOW_INSECURE_SERIALIZATION"):
        MsgpackDecoder(EngineCoreOutputs).decode(
            [encoded(EngineCoreOutputs, outputs=[], utility_output=[1, None, result])]
        )


# ---- our decoders


@pytest.mark.parametrize("decoder", OUR_DECODERS.values(), ids=OUR_DECODERS)
@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        b"\x80",
        pickle.dumps({"type": "Hello"}),
        msgspec.msgpack.encode(None),
        msgspec.msgpack.encode("Hello"),
        msgspec.msgpack.encode({"type": "Popen", "args": ["true"]}),
        msgspec.msgpack.encode({"type": 7}),
        msgspec.msgpack.encode(["i", [["epoch", 0]]]),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(CUSTOM_TYPE_PICKLE, pickle.dumps(1))),
    ],
)
def test_unknown_tags_and_garbage_are_refused(decoder: msgspec.msgpack.Decoder[Any], garbage: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decoder.decode(garbage)


@pytest.mark.parametrize("decoder", OUR_DECODERS.values(), ids=OUR_DECODERS)
@given(data=st.binary(max_size=64))
def test_whatever_comes_is_a_message_or_refused(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> None:
    """Nothing but the two errors that the wire expects."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        decoder.decode(data)


def test_a_pickle_in_an_untyped_value_stays_bytes(tmp_path: Path) -> None:
    """`CallEngine.arguments` may be anything msgpack has: an extension is only its code and its bytes."""
    folder = tmp_path / "made"
    bomb = msgspec.msgpack.Ext(CUSTOM_TYPE_PICKLE, pickle.dumps(Bomb(folder)))
    call = Call("c", CallEngine("m", [bomb]))

    message = OUR_DECODERS["to an instance"].decode(msgspec.msgpack.encode(call))

    assert message.request.arguments == [bomb]
    assert not folder.exists()
