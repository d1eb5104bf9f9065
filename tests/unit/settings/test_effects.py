"""Every setting has a test that shows its effect, and this is where it is written which.

A setting that is added to the model without a test here fails.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from carrel.settings.names import leaves

TESTS = Path(__file__).resolve().parents[2]

_OBJECTS = "unit/cli/test_objects.py::"
_CAPS = "integration/test_caps.py::"
_TLS = "integration/test_docker_tls.py::"
_DOCKER = "integration/test_docker.py::"
_EFFECTS = "integration/test_settings_effects.py::"
_KEPT = "integration/test_kept_files.py::"
_GIT = "integration/test_git_workspaces.py::"
_DEFAULTS = "integration/test_session_defaults.py::"
_MODES = "isolation/test_isolation_modes.py::"
_REFUSALS = "unit/settings/test_model.py::"

EFFECTS: dict[str, str] = {
    "host": _EFFECTS + "test_host_and_port",
    "port": _EFFECTS + "test_host_and_port",
    "data": _EFFECTS + "test_data_and_the_databases_path",
    "auth": "isolation/test_front_door.py::test_without_keys_no_foreign_page_gets_in",
    "allow_insecure": _REFUSALS + "test_what_is_unsafe_is_refused_unless_insisted_on",
    "memory": "integration/test_options.py::test_memory_mode_keeps_nothing",
    "durability": _EFFECTS + "test_durability",
    "log_level": _EFFECTS + "test_log_level",
    "model_upstream": _EFFECTS + "test_model_upstream",
    "credentials": "integration/test_direct_credentials.py::test_an_agent_asks_the_provider_with_the_operators_own_key",
    "anthropic_api_key": _EFFECTS + "test_the_credential_and_the_apis_address",
    "anthropic_auth_token": _EFFECTS + "test_the_credential_and_the_apis_address",
    "claude_code_oauth_token": _EFFECTS + "test_the_credential_and_the_apis_address",
    "anthropic_base_url": _EFFECTS + "test_the_credential_and_the_apis_address",
    "anthropic_model": "integration/test_options.py::test_a_session_of_its_own_model_default",
    "runtime": _DOCKER + "test_a_turn_with_tools_in_a_container_of_its_own",
    "runtimes": "unit/cli/test_runtimes.py::test_the_default_comes_first_then_those_beside_it",
    "docker.host": _DOCKER + "test_an_engine_that_is_away_is_waited_for_then_said_to_be",
    "docker.tls_ca": _TLS + "test_a_turn_in_a_container_of_an_engine_that_is_spoken_to_by_tls",
    "docker.tls_cert": _TLS + "test_a_turn_in_a_container_of_an_engine_that_is_spoken_to_by_tls",
    "docker.tls_key": _TLS + "test_a_turn_in_a_container_of_an_engine_that_is_spoken_to_by_tls",
    "docker.wait_seconds": _DOCKER + "test_an_engine_that_is_away_is_waited_for_then_said_to_be",
    "docker.image": _DOCKER + "test_an_image_that_is_missing_is_named",
    "docker.data_on_host": _DOCKER + "test_the_host_may_have_the_data_folder_elsewhere",
    **{
        f"docker.{name}": _DOCKER + "test_the_wall_is_as_the_settings_say"
        for name in (
            "platform",
            "oci_runtime",
            "mounts",
            "tmp_mb",
            "shm_mb",
            "oom_score_adj",
            "stop_grace_seconds",
        )
    },
    "isolation": _MODES + "test_in_a_container_agents_act_unasked_and_the_start_says_so",
    "network": _MODES + "test_network_host_reaches_the_host_and_its_api_wants_a_key",
    "egress.private_networks": "integration/test_network.py::test_a_bash_tool_reaches_what_is_allowed_and_nothing_else",
    "egress.max_connections": _EFFECTS + "test_bounds_of_the_egress_proxy",
    "egress.idle_seconds": _EFFECTS + "test_bounds_of_the_egress_proxy",
    "egress.max_mb": _EFFECTS + "test_bounds_of_the_egress_proxy",
    "allow_bypass_without_isolation": _MODES + "test_the_operator_may_insist_on_bypass",
    "read_only_paths": "integration/test_life.py::test_two_hundred_kilobytes_of_stderr_hang_nothing",
    "first_sandbox_uid": _EFFECTS + "test_first_sandbox_uid",
    "cli_path": "integration/test_life.py::test_an_agent_that_cannot_start_fails_the_session_until_resume",
    "git.protocols": _GIT + "test_private_addresses_and_plain_http_are_refused_unless_the_operator_says_so",
    "git.private_networks": _GIT + "test_private_addresses_and_plain_http_are_refused_unless_the_operator_says_so",
    "git.timeout_seconds": _GIT + "test_private_addresses_and_plain_http_are_refused_unless_the_operator_says_so",
    "git.folders": _GIT + "test_what_may_not_be_cloned_is_refused_in_plain_words",
    "git.max_mb": _GIT + "test_what_may_not_be_cloned_is_refused_in_plain_words",
    "idle_timeout_seconds": "integration/test_life.py::test_an_idle_session_costs_no_process_and_wakes_where_it_was",
    "secrets_key": "integration/test_environments.py::test_a_secret_reaches_the_agent_and_stands_nowhere_else",
    "warm_pool": "integration/test_pool.py::test_new_sessions_find_their_agent_connected",
    "launch_timeout_seconds": _EFFECTS + "test_launch_timeout_seconds",
    "defer_after_seconds": "integration/test_deferral.py::test_what_the_settings_say_of_waiting",
    "live_hold_seconds": "integration/test_deferral.py::test_calls_side_by_side_keep_their_process_and_are_denied_for_now",
    "reconnect_window_seconds": _EFFECTS + "test_what_a_runner_is_told",
    "drain_seconds": _EFFECTS + "test_drain_seconds",
    "max_queued_turns": _EFFECTS + "test_max_queued_turns",
    "max_frame_bytes": _EFFECTS + "test_what_a_runner_is_told",
    "max_file_bytes": "integration/test_api.py::test_a_file_that_is_too_large_is_refused_and_leaves_nothing",
    "max_archive_bytes": "integration/test_archives.py::test_what_may_not_be_unpacked_is_refused_and_nothing_comes_out_of_the_workspace",
    "outbox_memory_bytes": _EFFECTS + "test_what_a_runner_is_told",
    "outbox_disk_bytes": _EFFECTS + "test_what_a_runner_is_told",
    "stream_buffer_bytes": "integration/test_load.py::"
    "test_a_subscriber_that_stops_reading_holds_nobody_up_and_misses_nothing",
    "heartbeat_seconds": _EFFECTS + "test_heartbeat_seconds",
    "objects.kind": _OBJECTS + "test_in_the_clouds",
    "objects.path": _OBJECTS + "test_on_disk",
    "objects.bucket": _OBJECTS + "test_in_the_clouds",
    "objects.prefix": _OBJECTS + "test_in_the_clouds",
    "objects.endpoint": _OBJECTS + "test_in_the_clouds",
    "objects.region": _OBJECTS + "test_in_the_clouds",
    "objects.account": _OBJECTS + "test_in_the_clouds",
    "objects.access_key": _OBJECTS + "test_in_the_clouds",
    "objects.secret_key": _OBJECTS + "test_in_the_clouds",
    "objects.encryption_key": _OBJECTS + "test_encryption_is_turned_on_and_its_key_changed",
    "objects.old_encryption_keys": _OBJECTS + "test_encryption_is_turned_on_and_its_key_changed",
    "objects.accept_unencrypted": _OBJECTS + "test_encryption_is_turned_on_and_its_key_changed",
    "objects.timeout_seconds": _OBJECTS + "test_what_is_refused",
    "snapshots.enabled": "integration/test_kept_files.py::test_what_is_kept_is_for_the_operator_to_say",
    "snapshots.keep_days": _KEPT + "test_old_and_many_snapshots_go_as_the_settings_say",
    "snapshots.keep_mb": _KEPT + "test_old_and_many_snapshots_go_as_the_settings_say",
    "snapshots.keep_mb_per_user": _KEPT + "test_old_and_many_snapshots_go_as_the_settings_say",
    "snapshots.keep": "integration/test_kept_files.py::test_what_is_kept_is_for_the_operator_to_say",
    "snapshots.max_mb": "integration/test_kept_files.py::test_what_is_kept_is_for_the_operator_to_say",
    "snapshots.ignored": "integration/test_kept_files.py::test_what_is_kept_is_for_the_operator_to_say",
    "users.base_dir": _EFFECTS + "test_users_base_dir",
    "users.auto_create_dir": _EFFECTS + "test_users_auto_create_dir",
    "limits.max_sessions": _EFFECTS + "test_limits_of_sessions",
    "limits.max_sessions_per_user": _EFFECTS + "test_limits_of_sessions",
    "limits.max_depth": _EFFECTS + "test_limits_of_trees",
    "limits.max_children": _EFFECTS + "test_limits_of_trees",
    "limits.max_tree": _EFFECTS + "test_limits_of_trees",
    "limits.max_concurrent_turns": _EFFECTS + "test_limits_of_turns",
    "limits.max_waiting_turns": _EFFECTS + "test_limits_of_turns",
    "limits.memory_mb": _CAPS + "test_idle_sandboxes_make_room_and_the_rest_waits",
    "limits.memory_wait_seconds": _CAPS + "test_idle_sandboxes_make_room_and_the_rest_waits",
    "limits.disk_reserve_mb": "integration/test_full_disk.py::test_the_one_that_fills_the_disk_fails_and_the_rest_goes_on",
    "limits.sandbox_memory_mb": _CAPS + "test_a_tool_that_eats_memory",
    "limits.sandbox_processes": _CAPS + "test_a_fork_bomb",
    "limits.sandbox_disk_mb": "integration/test_disk_cap.py::test_one_that_writes_too_much_is_ended_and_may_make_room",
    "limits.sandbox_cpus": _CAPS + "test_cpus_are_capped",
    "limits.sandbox_caps": _CAPS + "test_a_tool_that_eats_memory",
    "database.path": _EFFECTS + "test_data_and_the_databases_path",
    "defaults.system_prompt": _EFFECTS + "test_defaults_reach_the_model",
    "defaults.permission_mode": _EFFECTS + "test_defaults_of_tools_and_permissions",
    "defaults.allowed_tools": _EFFECTS + "test_defaults_of_tools_and_permissions",
    "defaults.disallowed_tools": _EFFECTS + "test_defaults_of_tools_and_permissions",
    "defaults.setting_sources": _EFFECTS + "test_defaults_reach_the_model",
    "defaults.model": _EFFECTS + "test_defaults_reach_the_model",
    "defaults.max_turns": _EFFECTS + "test_default_of_turns_and_time",
    "defaults.ttl_seconds": _EFFECTS + "test_default_of_turns_and_time",
    "mcp_servers": _DEFAULTS + "test_an_mcp_server_of_the_settings_is_every_sessions",
    "plugins": _DEFAULTS + "test_a_plugin_of_the_settings_is_every_sessions_to_read",
    "kill_at": "kill/test_gateway.py::test_killed_at_a_named_point",
    **{
        f"budgets.{scope}.{unit}": "integration/test_budgets.py::test_each_budget_of_the_settings_is_held"
        for scope in ("turn", "session", "user", "user_day")
        for unit in ("max_usd", "max_tokens")
    },
    "prices_file": "integration/test_budgets.py::test_a_table_of_ones_own_gives_a_price",
    "rate_limits.per_key": _EFFECTS + "test_rate_limits",
    "rate_limits.per_address": _EFFECTS + "test_rate_limits",
    "cors_origins": _EFFECTS + "test_cors_origins",
    "trusted_proxies": _EFFECTS + "test_trusted_proxies",
    **{
        f"jwt.{name}": _EFFECTS + "test_who_vouches_for_tokens"
        for name in ("secret", "audience", "leeway_seconds", "user_claim", "scope_claim")
    },
    "jwt.jwks_url": _EFFECTS + "test_where_the_keys_of_tokens_are",
    "jwt.issuer": "integration/test_authentication.py::test_a_token_of_an_identity_provider_and_the_static_one",
    "static_token": "integration/test_authentication.py::test_a_token_of_an_identity_provider_and_the_static_one",
    **{
        f"database.{name}": _EFFECTS + "test_the_database_and_its_connections"
        for name in ("url", "pool_size", "statement_timeout_seconds")
    },
    "database.outage_seconds": "integration/test_outage.py::test_a_longer_outage_is_answered_503_and_over_by_itself",
    **{
        f"dialects.{dialect}.{name}": _EFFECTS + "test_a_dialects_listener_and_who_may_call_it"
        for dialect in ("claude-agent-http", "claudecode-api", "sdk-server")
        for name in ("port", "host", "auth")
    },
    "observability.log_format": _EFFECTS + "test_log_format",
    "observability.tracing": "integration/test_seen.py::test_a_trace_reaches_the_agent_and_its_model_requests",
    "observability.audit_prompts": "integration/dialects/test_audit.py::test_of_claude_agent_http",
    "observability.audit_days": "unit/cli/test_seen.py::test_the_audit_log_keeps_prompts_and_days_as_it_is_told",
}

NAMES = [leaf.name for leaf in leaves()]


@pytest.mark.parametrize("name", NAMES)
def test_its_effect_is_shown(name: str) -> None:
    assert name in EFFECTS, f"write down in EFFECTS which test shows what {name} does"


def test_nothing_else_is_written_down() -> None:
    assert EFFECTS.keys() == set(NAMES)


@cache
def functions(file: str) -> dict[str, str]:
    text = (TESTS / file).read_text()
    return {
        node.name: ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("name", EFFECTS)
def test_the_test_is_there_and_speaks_of_it(name: str) -> None:
    file, _, function = EFFECTS[name].partition("::")
    assert function in functions(file)
    last = name.rpartition(".")[2]
    assert re.search(rf"\b{last}\b", (TESTS / file).read_text()), f"{file} never names {last}"
