"""Every alert fires when it should, and none in a healthy cluster: promtool runs the rules on made series."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.metric_list import metric_names
from tests.e2e.prometheus import tool
from tests.unit.deploy.test_observability import metrics_in

ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
RUNBOOK = ROOT / "docs" / "alerts.md"
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for rule in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
}

SERVICE = 'job="pd-serve",service="chat",model_name="tiny"'

UNMOVABLE = f'pd_serve_instance_unmovable_requests{{{SERVICE},role="prefill"'

#: Series of a healthy service with traffic, over 30 minutes.
HEALTHY = {
    f'{UNMOVABLE},instance="prefill-0",reason="session"}}': "0x60",
    'up{job="pd-serve",api_server="a:1"}': "1x60",
    f"pd_serve_scheduler_up{{{SERVICE}}}": "1x60",
    f"pd_serve_integrity_problems{{{SERVICE}}}": "0x60",
    f"pd_serve_integrity_violations_total{{{SERVICE}}}": "0x60",
    f'pd_serve_recomputed_requests_total{{{SERVICE},reason="died"}}': "0x60",
    f'pd_serve_reconciliations_total{{{SERVICE},kind="resend"}}': "0x60",
    f'pd_serve_reconciliations_total{{{SERVICE},kind="unknown"}}': "0+1x60",
    f'pd_serve_requests_total{{{SERVICE},outcome="stop"}}': "0+100x60",
    f'pd_serve_requests_total{{{SERVICE},outcome="error"}}': "0x60",
    f'pd_serve_refused_requests_total{{{SERVICE},status="429"}}': "0x60",
    f'pd_serve_refused_requests_total{{{SERVICE},status="503"}}': "0x60",
    f"pd_serve_waiting_line_requests{{{SERVICE}}}": "0x60",
    f'pd_serve_api_server_message_errors_total{{{SERVICE},kind="decode"}}': "0x60",
    f'pd_serve_scheduler_message_errors_total{{{SERVICE},kind="decode"}}': "0x60",
    f'pd_serve_manager_message_errors_total{{{SERVICE},kind="decode"}}': "0x60",
    f'pd_serve_migrations_total{{{SERVICE},reason="handoff",outcome="committed"}}': "0+100x60",
    f'pd_serve_migrations_total{{{SERVICE},reason="handoff",outcome="aborted"}}': "0+50x60",
    f'pd_serve_aborted_migrations_total{{{SERVICE},reason="handoff",code="no_free_blocks"}}': "0+50x60",
    f'pd_serve_aborted_migrations_total{{{SERVICE},reason="handoff",code="timed_out"}}': "0x60",
    f'pd_serve_wanted_instances{{{SERVICE},role="decode"}}': "2x60",
    f'pd_serve_ready_instances{{{SERVICE},role="decode"}}': "2x60",
    f'pd_serve_time_to_first_token_seconds_bucket{{{SERVICE},le="0.1"}}': "0+100x60",
    f'pd_serve_time_to_first_token_seconds_bucket{{{SERVICE},le="10"}}': "0+100x60",
    f'pd_serve_time_to_first_token_seconds_bucket{{{SERVICE},le="+Inf"}}': "0+100x60",
} | {
    f'pd_serve_instance_{name}{{{SERVICE},role="decode",instance="decode-{number}"{labels}}}': values
    for number in range(2)
    for name, labels, values in (
        ("protocol_errors_total", "", "0x60"),
        ("refused_orders_total", ',reason="policy"', "0x60"),
        ("waiting", "", "3x60"),
        ("running", "", "20x60"),
        ("free_blocks", "", "50x60"),
        ("total_blocks", "", "100x60"),
        ("stranded", "", "0x60"),
        ("migration_enabled", "", "1x60"),
        ("unmovable_requests", ',reason="session"', "2x60"),
    )
}

#: For each alert, the beginning of a series' name with labels, and the values that set the alert off.
FIRES = {
    "PdServeApiServerDown": [("up{", "0x60")],
    "PdServeSchedulerDown": [("pd_serve_scheduler_up{", "0x60")],
    "PdServeIntegrityViolation": [("pd_serve_integrity_problems{", "1x60")],
    "PdServeProtocolErrors": [("pd_serve_instance_refused_orders_total{", "0+1x60")],
    "PdServeRequestsRecomputed": [("pd_serve_recomputed_requests_total{", "0+1x60")],
    "PdServeMessagesLost": [(f'pd_serve_reconciliations_total{{{SERVICE},kind="resend"', "0+1x60")],
    "PdServeErrorRate": [(f'pd_serve_requests_total{{{SERVICE},outcome="error"', "0+2x60")],
    "PdServeRequestsRefused": [(f'pd_serve_refused_requests_total{{{SERVICE},status="429"', "0+5x60")],
    "PdServeLongQueue": [("pd_serve_waiting_line_requests{", "50x60")],
    "PdServeKvCacheFull": [("pd_serve_instance_free_blocks{", "4x60")],
    "PdServeHandoffsRefused": [("pd_serve_instance_stranded{", "2x60")],
    "PdServeMigrationsAborted": [
        (f'pd_serve_aborted_migrations_total{{{SERVICE},reason="handoff",code="timed_out"', "0+20x60")
    ],
    "PdServeFewerInstancesThanWanted": [("pd_serve_ready_instances{", "1x60")],
    "PdServeEngineCannotMove": [
        (f'pd_serve_instance_migration_enabled{{{SERVICE},role="decode",instance="decode-1"', "0x60")
    ],
    "PdServeRequestsCannotMove": [(UNMOVABLE, "2x60")],
    "PdServeSlowFirstToken": [
        (f'pd_serve_time_to_first_token_seconds_bucket{{{SERVICE},le="0.1"', "0+1x60"),
    ],
}

#: Other conditions of these alerts.
ALSO_FIRES = [
    ("PdServeIntegrityViolation", "pd_serve_integrity_violations_total{", "0+1x60"),
    ("PdServeProtocolErrors", "pd_serve_instance_protocol_errors_total{", "0+1x60"),
    ("PdServeProtocolErrors", "pd_serve_api_server_message_errors_total{", "0+1x60"),
    ("PdServeProtocolErrors", "pd_serve_scheduler_message_errors_total{", "0+1x60"),
    ("PdServeProtocolErrors", "pd_serve_manager_message_errors_total{", "0+1x60"),
    ("PdServeRequestsRefused", f'pd_serve_refused_requests_total{{{SERVICE},status="503"', "0+5x60"),
]

#: Alerts that do not name a service.
WITHOUT_SERVICE = {"PdServeApiServerDown"}


def series(changes: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    changed = dict(HEALTHY)
    for beginning, values in changes:
        names = [name for name in HEALTHY if name.startswith(beginning)]
        assert names, beginning
        changed |= dict.fromkeys(names, values)
    return [{"series": name, "values": values} for name, values in changed.items()]


def promtool_test(tmp_path: Path, cases: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    if (promtool := tool("promtool")) is None:
        pytest.skip("no promtool on the PATH, and apt-get cannot fetch prometheus' package")
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": cases}), encoding="utf-8")
    return subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)


def fired(tmp_path: Path, changes: list[tuple[str, str]]) -> dict[str, str]:
    """The alerts that fire after 25 minutes, with the labels of the first one as text."""
    quiet = [{"eval_time": "25m", "alertname": name, "exp_alerts": []} for name in RULES]
    case = {"interval": "30s", "input_series": series(changes), "alert_rule_test": quiet}
    output = promtool_test(tmp_path, [case])
    # For each alert that fires unexpectedly, promtool prints what it got.
    got = r"exp:\[\s*\],?\s*\n\s*got:\[\s*\n?\s*0:\s*\n?\s*Labels:\{([^}]*)\}"
    pattern = rf"alertname: (\w+), time: 25m, *\n\s*{got}"
    found = dict(re.findall(pattern, output.stdout + output.stderr))
    assert bool(found) == bool(output.returncode), output.stdout + output.stderr
    return found


def test_no_alert_fires_in_a_healthy_cluster(tmp_path: Path) -> None:
    assert fired(tmp_path, []) == {}


def test_every_alert_is_set_off_by_a_test() -> None:
    assert FIRES.keys() == RULES.keys()


@pytest.mark.parametrize("alert", FIRES)
def test_an_alert_fires_alone_and_names_the_service(alert: str, tmp_path: Path) -> None:
    for changes in (FIRES[alert], *([other[1:]] for other in ALSO_FIRES if other[0] == alert)):
        found = fired(tmp_path, changes)
        assert found.keys() == {alert}
        assert f'severity="{RULES[alert]["labels"]["severity"]}"' in found[alert]
        assert ('service="chat"' in found[alert]) == (alert not in WITHOUT_SERVICE)
        assert ('model_name="tiny"' in found[alert]) == (alert not in WITHOUT_SERVICE)


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_has_a_severity_and_a_section_of_the_runbook(alert: str) -> None:
    rule = RULES[alert]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")

    assert rule["labels"]["severity"] in ("critical", "warning")
    assert ROOT / page == RUNBOOK
    assert anchor == alert.lower()
    section = RUNBOOK.read_text(encoding="utf-8").partition(
        f"## {alert}\n\n**{rule['labels']['severity']}.**"
    )
    assert section[2].strip(), "no section, or one with another severity"
    assert metrics_in(rule["expr"]) - metric_names() == set()


@pytest.mark.parametrize("alert", RULES)
def test_a_summary_rounds_what_is_extrapolated(alert: str) -> None:
    """Prometheus extrapolates an increase, so that one of 15 is shown as 15.129310344827585."""
    rule = RULES[alert]
    if re.search(r"\b(rate|increase|histogram_quantile)\(", rule["expr"]):
        assert "{{ $value }}" not in rule["annotations"]["summary"]


def test_the_runbook_has_no_other_alerts() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE) == list(RULES)
