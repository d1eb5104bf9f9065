"""What a Bash tool can get hold of, as root and as an ordinary user: files, processes and the kernel."""

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap")]


def test_the_prober_is_able_to_find_things(found):
    assert found.probe["control_own_files"] == "mine"
    assert found.probe["control_terminals"] is True
    assert found.probe["control_gateway"] == ["200", "200"]
    failed = {name: got for name, got in found.probe.items() if "probe itself failed" in str(got)}
    assert not failed


def test_agents_have_no_privilege_left(found):
    status = found.probe["control_status"]
    capabilities = {status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh")}
    assert capabilities == {"0000000000000000"}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert "0" not in status["Uid"].split()
    assert "0" not in status["Gid"].split()


def test_files_of_the_host_and_of_neighbours_are_out_of_reach(found):
    found.refused("host_files")
    found.refused("host_files_through_proc")
    found.refused("descriptors_that_lead_out")
    found.refused("neighbours_marker")


def test_memory_and_queues_are_not_shared(found):
    found.refused("shared_memory")
    found.refused("message_queue")


def test_keyrings_are_closed(found):
    found.refused("keyring")


def test_processes_of_others_are_not_seen(found):
    found.refused("processes_of_others")


def test_processes_of_others_are_not_signalled(found):
    found.refused("signals")
    found.refused("signals_to_all")
    assert not found.host["signalled"]


def test_processes_of_others_are_not_traced_or_read(found):
    found.refused("trace")
    found.refused("memory_of_others")


def test_core_pattern_and_other_settings_of_the_kernel_are_read_only(found):
    found.refused("core_pattern")
    found.refused("sysctls")
    found.refused("sysrq")
    assert found.host["core_pattern after"] == found.host["core_pattern"]


def test_nothing_can_be_mounted(found):
    found.refused("mount")
    found.refused("remount_usr")
    found.refused("unmount")


def test_no_namespace_can_be_made_or_entered(found):
    found.refused("namespaces")
    found.refused("namespaces_by_command")
    found.refused("enter_namespaces")
    found.refused("change_root")


def test_devices_and_the_kernels_memory_are_out_of_reach(found):
    found.refused("device_nodes")
    found.refused("devices")
    found.refused("kernel_memory")
    found.refused("kernel_log")


def test_nobody_becomes_root(found):
    found.refused("become_root")
    found.refused("setuid_programs")


def test_system_files_are_hidden_or_read_only(found):
    found.refused("system_files")
    found.refused("change_the_system")


def test_the_servers_terminal_is_not_theirs(found):
    found.refused("a_terminal_of_ours")


def test_each_session_has_a_user_of_its_own_where_carrel_is_root(found):
    assert (found.host["workspace owner"] >= 700_000) == found.as_root


def test_the_data_folder_is_private(found):
    modes = found.host["modes"]
    assert modes["data"] == 0o700
    assert modes["admin.key"] == 0o600
    assert modes["session"] == 0o700
    assert modes["sandbox"] == 0o700
    assert modes["sandboxes"] == 0o700
    assert modes["link.sock"] == 0o600
