"""Images, at the level of configuration and messages: no vision model starts on this CPU build."""

import copy
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from vllm.config import MultiModalConfig, VllmConfig
from vllm.multimodal.cache import engine_receiver_cache_from_config, processor_cache_from_config
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalSharedField,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from migration.vllm_engine import compatibility, worker
from migration.vllm_engine.compatibility import unmovable
from migration.vllm_engine.request_loader import RequestLoader
from pd_serve.api.codec import VllmCodec
from pd_serve.launch.engine_flags import ParsedFlags, parse
from pd_serve.models import resolve

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]


def image() -> MultiModalKwargsItem:
    pixels = MultiModalFieldElem(data=torch.arange(12.0), field=MultiModalSharedField(batch_size=1))
    return MultiModalKwargsItem({"pixel_values": pixels})


def feature(data: MultiModalKwargsItem | None) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(data, "image", "hash", PlaceholderRange(offset=1, length=4), "hash")


def vision(config: VllmConfig) -> Any:
    """The part of a configuration that caches are made from, as if the model took images."""
    settings = MultiModalConfig(mm_processor_cache_gb=1)
    model = SimpleNamespace(supports_multimodal_inputs=True, get_multimodal_config=lambda: settings)
    return SimpleNamespace(model_config=model, parallel_config=config.parallel_config)


@pytest.fixture(scope="module")
def flags() -> ParsedFlags:
    return parse([], {"model": resolve("tiny"), "dtype": "float32", "max_model_len": 256})


class TestProcessorCache:
    def test_an_api_server_sends_the_data_of_an_image_with_every_request(self, flags: ParsedFlags) -> None:
        """vLLM's own front end sends it once: the second instance that gets the hash would not have it."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        def sent(config: VllmConfig) -> list[bool]:
            cache = processor_cache_from_config(vision(config))
            assert cache is not None
            items = [cache.get_and_update_item((image(), []), "hash")[0] for _ in range(2)]
            return [item is not None for item in items]

        assert sent(flags.server_config()) == [True, True]
        assert sent(AsyncEngineArgs.from_cli_args(flags.server).create_engine_config()) == [True, False]

    @pytest.mark.parametrize("role", ["prefill", "decode", "neutral"])
    def test_an_instance_keeps_no_images(self, flags: ParsedFlags, role: str) -> None:
        config = flags.engine_config(role)
        whole = vision(config)
        whole.model_config.get_multimodal_config().mm_processor_cache_gb = flags.engine(role)[
            "mm_processor_cache_gb"
        ]
        assert engine_receiver_cache_from_config(whole) is None


def request_with(features: list[MultiModalFeatureSpec]) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=list(range(8)),
        mm_features=features,
        sampling_params=SamplingParams(max_tokens=5),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


class Core:
    """The part of an engine core that decodes a request and gives it to a runner of the first version."""

    mm_receiver_cache = None
    request_block_hasher = None
    preprocess_add_request = EngineCore.preprocess_add_request

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(use_v2_model_runner=False)
        self.initialised: list[Any] = []
        self.runner = SimpleNamespace(
            requests={}, device="cpu", uses_mrope=True, _init_mrope_positions=self.initialised.append
        )

    def collective_rpc(self, function: Any, args: tuple[Any, ...]) -> list[Any]:
        wrapper = SimpleNamespace(worker=SimpleNamespace(model_runner=self.runner))
        return [function(wrapper, *copy.deepcopy(args))]


def loader(core: Core) -> RequestLoader:
    return RequestLoader(cast(EngineCore, core))


def test_an_image_arrives_with_its_data_and_its_request_may_move() -> None:
    core = Core()
    frames = [bytes(frame) for frame in VllmCodec().encode_request(request_with([feature(image())]))]
    for _ in range(2):  # the prefill instance, and the one that gets the same frames in an offer
        _, request = loader(core).decode(frames)
        (found,) = request.mm_features
        assert found.data is not None
        assert torch.equal(cast(torch.Tensor, found.data["pixel_values"].data), torch.arange(12.0))
        assert (found.identifier, found.mm_position.offset, found.mm_position.length) == ("hash", 1, 4)
        assert unmovable(request) is None


def test_a_request_with_very_large_inputs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offer would not fit a message, and the connection of the instances would end."""
    frames = [bytes(frame) for frame in VllmCodec().encode_request(request_with([feature(image())]))]
    _, request = loader(Core()).decode(frames)
    assert unmovable(request, frames) is None
    monkeypatch.setattr(compatibility, "MAX_MOVED_BYTES", sum(map(len, frames)) - 1)
    assert unmovable(request, frames) == "too_large"


def test_a_request_with_a_hash_in_the_place_of_an_image_stays() -> None:
    frames = [bytes(frame) for frame in VllmCodec().encode_request(request_with([feature(None)]))]
    _, request = loader(Core()).decode(frames)
    assert unmovable(request) == "no_data"


@pytest.mark.parametrize("computed", [0, 9])
def test_a_runner_gets_images_and_positions(computed: int) -> None:
    """With the data also behind computed tokens: a preempted request is computed anew. M-RoPE models need
    positions for every request, with and without images.
    """
    core = Core()
    _, request = loader(core).decode(
        [bytes(frame) for frame in VllmCodec().encode_request(request_with([feature(image())]))]
    )
    request.append_output_token_ids([40, 41])
    loader(core).install(request, computed, None)
    (state,) = core.runner.requests.values()
    assert core.initialised == [state]
    assert state.mm_features[0].data is not None
    assert (state.num_computed_tokens, state.output_token_ids) == (computed, [40, 41])


def test_a_runner_of_another_kind_of_model_gets_no_positions() -> None:
    core = Core()
    core.runner.uses_mrope = False
    state = NewRequestData("r", [1, 2], [], SamplingParams(), None, ([],), 1, None)
    core.collective_rpc(worker.install_request, (state, [3], None))
    assert core.initialised == []
    assert core.runner.requests["r"].num_tokens == 3
