"""A directory that several agents of a user share: what one of them does to its path leads no other one out."""

import os

import pytest

pytestmark = [pytest.mark.cli, pytest.mark.requires("bubblewrap"), pytest.mark.requires("root")]
ORDINARY = 4321


@pytest.mark.parametrize("uid", [None, ORDINARY], ids=["root", "ordinary user"])
def test_a_link_put_in_the_place_of_a_shared_directory_is_not_mounted(open_house, short_folder, uid):
    outside = short_folder / "outside"
    outside.mkdir()
    (outside / "secret").write_text("the host's")
    if uid is not None:
        os.chown(outside, uid, uid)
    with open_house(short_folder, uid=uid, model_upstream="scripted") as home:
        whole = home.session(workspace={"type": "user"})
        inner = home.session(workspace={"type": "user", "subdir": "a/b"})
        assert home.bash(inner, "echo mine > f; cat f; pwd; ls /proc/self/fd | wc -l").split()[:2] == [
            "mine",
            "/workspace",
        ]
        assert home.bash(whole, "cat a/b/f") == "mine"
        # No directory of the host is left open to the agent.
        open_places = home.bash(inner, "readlink /proc/self/fd/* | grep -v -e pipe: -e socket: -e /dev/ -e /proc; true")
        assert str(home.data) not in open_places
        assert home.client.post(f"/sessions/{inner}/stop").status_code == 200
        home.bash(whole, f"mv a b; ln -s {outside} a; mkdir -p x; ln -s {outside} x/b; ls -l")
        home.client.post(f"/sessions/{inner}/resume")
        result = home.turn(inner, "[[bash: cat secret f]]")
        assert result["status"] == "failed"
        assert result["error"]["code"] == "path_conflict"
        assert "the host" not in str(result)
        home.bash(whole, "rm a; mv b a")
        assert home.bash(inner, "cat f") == "mine"
