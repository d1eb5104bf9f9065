"""One suite of checks for each contract. A check is an async function that raises NotConforming, or returns.

With pytest:

    @pytest.mark.parametrize("check", store.CHECKS.values(), ids=store.CHECKS)
    async def test_my_store(check):
        await check(open_my_store)
"""

from carrel.testing.conformance.checks import NotConforming, failures

__all__ = ["NotConforming", "failures"]
