"""Responses in memory: whose they are, and how much room they take."""

from hypothesis import given
from hypothesis import strategies as st

from localmoe.gateway.responses.store import MemoryResponseStore


async def test_what_is_kept_is_its_owners_only() -> None:
    store = MemoryResponseStore()
    await store.put("ann", "resp_1", b"hers")
    assert await store.get("bob", "resp_1") is None
    assert await store.delete("bob", "resp_1") is False
    await store.put("bob", "resp_1", b"his")
    assert await store.get("ann", "resp_1") == b"hers"
    assert await store.delete("ann", "resp_1") is True
    assert await store.delete("ann", "resp_1") is False
    assert await store.get("bob", "resp_1") == b"his"


async def test_what_was_not_asked_for_longest_goes_first() -> None:
    store = MemoryResponseStore(max_bytes=3 * 1600)
    for name in "abc":
        await store.put("ann", name, b"x" * 1000)
    await store.get("ann", "a")
    await store.put("ann", "d", b"x" * 1000)
    assert [name for name in "abcd" if await store.get("ann", name)] == ["a", "c", "d"]
    await store.put("ann", "e", b"x" * 10_000)
    assert await store.get("ann", "e") is None


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3000), st.booleans()), max_size=30))
async def test_memory_has_a_bound(changes: list[tuple[str, int, bool]]) -> None:
    max_bytes = 8000
    store = MemoryResponseStore(max_bytes=max_bytes)
    last: dict[str, int] = {}
    fitted = True
    for name, num_bytes, is_put in changes:
        if is_put:
            await store.put("ann", name, b"x" * num_bytes)
            last[name] = num_bytes
        else:
            await store.delete("ann", name)
            last.pop(name, None)
        fitted &= sum(last.values()) + 1000 * len(last) <= max_bytes
    kept = {name: data for name in "abcd" if (data := await store.get("ann", name)) is not None}
    assert sum(map(len, kept.values())) <= max_bytes
    assert all(len(data) == last[name] for name, data in kept.items())
    if fitted:
        assert kept.keys() == last.keys()
