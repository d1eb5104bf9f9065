"""What a caller who sends rubbish is told."""

import pytest


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ('{"title": ', "body: is not JSON, from character 10 on"),
        ("[]", "body: must be a JSON object"),
        ('{"titel": "x"}', "body.titel: there is no such field"),
        ('{"metadata": 3}', "body.metadata: must be a JSON object"),
    ],
)
async def test_a_session_that_makes_no_sense_is_refused_in_plain_words(build, body, detail):
    async with (await build()).client(content_type="application/json") as client:
        answer = await client.post("/api/v1/sessions", content=body)
    assert answer.status_code == 422
    assert answer.json()["code"] == "validation_failed"
    assert answer.json()["detail"] == detail
    (error,) = answer.json()["errors"]
    assert f"{error['field']}: {error['message']}" == detail


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "body: give either prompt or content"),
        ({"prompt": ""}, "body.prompt: String should have at least 1 character"),
    ],
)
async def test_a_prompt_that_makes_no_sense_is_refused_in_plain_words(build, body, detail):
    async with (await build()).client() as client:
        session = (await client.post("/api/v1/sessions", json={})).json()["id"]
        answer = await client.post(f"/api/v1/sessions/{session}/turns", json=body)
    assert (answer.status_code, answer.json()["detail"]) == (422, detail)


async def test_what_is_left_out_is_named(build):
    async with (await build()).client() as client:
        answer = await client.post("/api/v1/users", json={})
    assert (answer.status_code, answer.json()["detail"]) == (422, "body.id: is required")
