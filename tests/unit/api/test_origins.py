"""CORS is closed until it is opened; foreign pages and names are refused, with a key and without."""

import pytest

from carrel.api.limits import Limiter
from carrel.api.origins import Origins
from carrel.errors import InvalidSettings, UnsafeConfiguration, UntrustedOrigin

LISTED = "https://app.example.com"


def cors(answer):
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


@pytest.mark.parametrize(
    "wrong", ["app.example.com", "https://app.example.com/", "https://*.example.com/x", "null", ""]
)
def test_what_is_not_an_origin_stops_the_start(wrong):
    with pytest.raises(InvalidSettings, match="cors_origins"):
        Origins([wrong])


def test_any_origin_without_a_key_stops_the_start():
    with pytest.raises(UnsafeConfiguration, match="every page"):
        Origins(["*"], key_wanted=False)
    assert Origins(["*"]).has("https://anything.example")


async def test_cors_is_closed_by_default(build):
    called = await build()
    async with called.client(Origin=LISTED) as client:
        for method in ("GET", "POST", "OPTIONS"):
            answer = await client.request(method, "/api/v1/sessions", headers={"Access-Control-Request-Method": "POST"})
            assert answer.status_code == 403, method
            assert answer.json()["code"] == UntrustedOrigin.code
            assert not cors(answer)


async def test_a_listed_origin_may_read_and_another_may_not(build):
    called = await build(origins=Origins([LISTED]))
    async with called.client(Origin=LISTED) as client:
        answer = await client.get("/api/v1/sessions")
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == LISTED
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert "Origin" in answer.headers["Vary"]
    for other in ("https://evil.example", "http://app.example.com", "https://app.example.com.evil.example", "null"):
        async with called.client(Origin=other) as client:
            answer = await client.get("/api/v1/sessions")
            assert answer.status_code == 403, other
            assert not cors(answer)
    async with called.client() as client:
        answer = await client.get("/api/v1/sessions")
        assert answer.status_code == 200
        assert not cors(answer)
        assert "Origin" in answer.headers["Vary"]  # or a cache would give this answer to the listed page


async def test_preflights_are_answered_for_listed_origins_alone(build):
    called = await build(origins=Origins([LISTED]))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with called.client(key=None) as client:
        answer = await client.options("/api/v1/sessions", headers={"Origin": LISTED, **asked})
        assert answer.status_code == 204
        assert answer.headers["Access-Control-Allow-Origin"] == LISTED
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        answer = await client.options("/api/v1/sessions", headers={"Origin": "https://evil.example", **asked})
        assert answer.status_code == 403
        assert not cors(answer)


async def test_errors_carry_the_headers_too(build):
    called = await build(origins=Origins([LISTED]), per_key=Limiter("key", "2/minute"))
    seen = []
    async with called.client(Origin=LISTED) as client:
        seen.append(await client.get("/api/v1/sessions", headers={"Authorization": "Bearer wrong"}))
        seen.append(await client.get("/api/v1/models"))  # fails with an error that nobody expected
        seen.append(await client.get("/api/v1/sessions/unknown"))
        seen.append(await client.get("/api/v1/sessions"))
    assert [answer.status_code for answer in seen] == [401, 500, 404, 429]
    for answer in seen:
        assert answer.headers["Access-Control-Allow-Origin"] == LISTED, answer.status_code
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
        assert answer.headers["X-Request-Id"]


async def test_any_origin_is_never_told_together_with_credentials(build):
    called = await build(origins=Origins(["*"]))
    async with called.client(Origin="https://anything.example") as client:
        answer = await client.get("/api/v1/sessions")
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("auth", [True, False])
async def test_a_name_of_an_attackers_that_leads_to_loopback_opens_nothing(build, auth):
    called = await build(auth=auth, origins=Origins([LISTED]))
    async with called.client() as client:
        for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[", ""):
            answer = await client.get("/api/v1/sessions", headers={"Host": name})
            assert answer.status_code == 403, name
            # Its page is of that very origin, so Origin and Host agree.
            answer = await client.get("/api/v1/sessions", headers={"Host": name, "Origin": f"http://{name}"})
            assert answer.status_code == 403, name
        for name in ("localhost", "127.0.0.1:8000", "[::1]:8000", "app.example.com"):
            assert (await client.get("/api/v1/sessions", headers={"Host": name})).status_code == 200, name


async def test_off_loopback_names_are_the_operators_and_origins_are_checked_still(build):
    called = await build(loopback=False)
    async with called.client() as client:
        for origin, status in (("http://carrel.example", 200), ("https://evil.example", 403), (None, 200)):
            headers = {"Host": "carrel.example"} | ({"Origin": origin} if origin else {})
            assert (await client.get("/api/v1/sessions", headers=headers)).status_code == status, origin
