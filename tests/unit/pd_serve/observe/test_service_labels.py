"""Service and model on every sample of pd-serve and vLLM."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from pd_serve.observe.service_labels import WithLabels

LABELS = {"service": "chat", "model_name": "tiny"}


def exposed(registry: CollectorRegistry) -> str:
    shown = CollectorRegistry()
    shown.register(WithLabels(registry, LABELS, {"api_server": "api"}))
    return generate_latest(shown).decode()


def test_samples_of_two_services_with_instances_of_one_name_differ() -> None:
    registry = CollectorRegistry()
    Gauge("pd_serve_instance_running", "", ["instance"], registry=registry).labels("decode-0").set(3)
    Counter("pd_serve_requests", "", registry=registry).inc()

    text = exposed(registry)

    assert (
        'pd_serve_instance_running{api_server="api",instance="decode-0",model_name="tiny",service="chat"} 3.0'
        in text
    )
    assert 'pd_serve_requests_total{api_server="api",model_name="tiny",service="chat"} 1.0' in text


def test_a_label_that_a_sample_has_stays() -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "", ["model_name"], registry=registry).labels("other").set(1)

    assert 'vllm:num_requests_running{api_server="api",model_name="other",service="chat"} 1.0' in exposed(
        registry
    )


def test_metrics_of_the_process_have_its_name_only() -> None:
    registry = CollectorRegistry()
    Gauge("python_info", "", registry=registry).set(1)

    assert 'python_info{api_server="api"} 1.0' in exposed(registry)
