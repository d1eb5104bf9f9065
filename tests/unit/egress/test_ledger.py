"""What is counted is stored, also across a store that is away for a while."""

from contextlib import AsyncExitStack

from carrel.errors import StoreUnavailable
from carrel.testing.conformance.store import new_session


async def test_requests_are_counted_and_stored_in_batches(open_store, make_ledger):
    session = new_session(1)
    await open_store.write(lambda tx: tx.sessions.add(session))
    told = []
    ledger = make_ledger(open_store, told)
    for _ in range(3):
        ledger.record(session.id, "a.example", 443, "allowed", "listed")
    ledger.record(session.id, "b.example", 22, "refused", "port")
    ledger.record("nobody", "b.example", 22, "refused", "port")
    await ledger.flush()
    ledger.record(session.id, "a.example", 443, "allowed", "listed")
    await ledger.flush()
    page = await open_store.read(lambda tx: tx.network.page(session.id, cursor=None, limit=10))
    assert [(each.host, each.port, each.verdict, each.reason, each.count) for each in page.items] == [
        ("b.example", 22, "refused", "port", 1),
        ("a.example", 443, "allowed", "listed", 4),
    ]
    assert page.items[1].first_at < page.items[1].last_at
    assert len(told) == 6


async def test_what_waits_is_stored_at_the_end(open_store, make_ledger):
    session = new_session(1)
    await open_store.write(lambda tx: tx.sessions.add(session))
    async with AsyncExitStack() as stack:
        ledger = make_ledger(open_store, [])
        await ledger.start(stack)
        ledger.record(session.id, "a.example", 443, "allowed", "listed")
    page = await open_store.read(lambda tx: tx.network.page(session.id, cursor=None, limit=10))
    assert [each.count for each in page.items] == [1]


async def test_a_store_that_is_away_loses_no_count(open_store, make_ledger):
    class Away:
        away = True

        async def write(self, work):
            if self.away:
                raise StoreUnavailable
            return await open_store.write(work)

    session = new_session(1)
    await open_store.write(lambda tx: tx.sessions.add(session))
    store = Away()
    ledger = make_ledger(store, [])
    for _ in range(2):
        ledger.record(session.id, "a.example", 443, "allowed", "listed")
        try:
            await ledger.flush()
        except StoreUnavailable:
            continue
        raise AssertionError("it was away")
    store.away = False
    await ledger.flush()
    page = await open_store.read(lambda tx: tx.network.page(session.id, cursor=None, limit=10))
    assert [each.count for each in page.items] == [2]
