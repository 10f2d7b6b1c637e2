"""The prefix trie against a search through all prefixes that is obviously right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serval_core.names import DEFAULT_PREFIX, DEFAULT_SERVICE, ServiceID, ServicePrefix
from serval_core.prefix_trie import PrefixTrie

# Few distinct bytes, so that prefixes nest and lookups hit.
service_ids = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.lists(st.sampled_from([0x00, 0x01, 0x80, 0xFF]), min_size=32, max_size=32).map(bytes),
    st.integers(0, 15).map(lambda number: bytes([number << 4]) + bytes(31)),
).map(ServiceID)
bit_counts = st.one_of(st.integers(0, 256), st.sampled_from([0, 1, 2, 3, 4, 8, 31, 32, 33, 255, 256]))
prefixes = st.builds(ServicePrefix.of, service_ids, bit_counts)


def longest_by_search(stored: dict[ServicePrefix, int], service_id: ServiceID) -> int | None:
    text = "".join(f"{byte:08b}" for byte in service_id)
    best, best_bits = None, -1
    for prefix, value in stored.items():
        head = "".join(f"{byte:08b}" for byte in prefix.service_id)[: prefix.bits]
        if prefix.bits > best_bits and text.startswith(head):
            best, best_bits = value, prefix.bits
    return best


@given(st.dictionaries(prefixes, st.integers(), max_size=30), st.lists(service_ids, min_size=1, max_size=20))
def test_longest_match_agrees_with_a_search_through_everything(
    stored: dict[ServicePrefix, int], questions: list[ServiceID]
) -> None:
    trie: PrefixTrie[int] = PrefixTrie()
    for prefix, value in stored.items():
        trie.set(prefix, value)
    for service_id in [*questions, *(prefix.service_id for prefix in stored)]:
        assert trie.longest_match(service_id) == longest_by_search(stored, service_id)


class TrieBesideDictionary(RuleBasedStateMachine):
    """Sets and removals in any order leave the trie equal to a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.trie: PrefixTrie[int] = PrefixTrie()
        self.stored: dict[ServicePrefix, int] = {}

    @rule(prefix=prefixes, value=st.integers())
    def set(self, prefix: ServicePrefix, value: int) -> None:
        self.trie.set(prefix, value)
        self.stored[prefix] = value

    @rule(prefix=prefixes)
    def remove(self, prefix: ServicePrefix) -> None:
        if prefix in self.stored:
            self.trie.remove(prefix)
            del self.stored[prefix]
        else:
            with pytest.raises(KeyError):
                self.trie.remove(prefix)

    @rule(data=st.data())
    def remove_stored(self, data: st.DataObject) -> None:
        if self.stored:
            self.remove(data.draw(st.sampled_from(sorted(self.stored))))

    @rule(service_id=service_ids)
    def look_up(self, service_id: ServiceID) -> None:
        assert self.trie.longest_match(service_id) == longest_by_search(self.stored, service_id)

    @invariant()
    def same_content(self) -> None:
        assert len(self.trie) == len(self.stored)
        assert sorted(self.trie.values()) == sorted(self.stored.values())
        for prefix, value in self.stored.items():
            assert self.trie.get(prefix) == value


TestTrieBesideDictionary = TrieBesideDictionary.TestCase
TestTrieBesideDictionary.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_empty_trie_matches_nothing() -> None:
    trie: PrefixTrie[int] = PrefixTrie()
    assert trie.longest_match(DEFAULT_SERVICE) is None
    assert trie.get(DEFAULT_PREFIX) is None
    assert len(trie) == 0


def test_every_length_can_be_in_use_at_once() -> None:
    service_id = ServiceID(bytes([0xA5]) * 32)
    trie: PrefixTrie[int] = PrefixTrie()
    for bits in range(257):
        trie.set(ServicePrefix.of(service_id, bits), bits)
    for bits in range(256, 0, -1):
        assert trie.longest_match(service_id) == bits
        flipped = int.from_bytes(service_id, "big") ^ (1 << (256 - bits))
        assert trie.longest_match(ServiceID(flipped.to_bytes(32, "big"))) == bits - 1
        trie.remove(ServicePrefix.of(service_id, bits))
    assert trie.longest_match(service_id) == 0


def test_values_come_longest_prefix_first() -> None:
    trie: PrefixTrie[str] = PrefixTrie()
    one = ServiceID.from_number(1)
    for bits in (0, 32, 256, 8):
        trie.set(ServicePrefix.of(one, bits), str(bits))
    assert list(trie.values()) == ["256", "32", "8", "0"]


def test_bits_beyond_the_prefix_do_not_matter() -> None:
    trie: PrefixTrie[int] = PrefixTrie()
    untidy = ServicePrefix(ServiceID(bytes([0xFF]) * 32), 8)
    trie.set(untidy, 1)
    assert trie.get(ServicePrefix.of(untidy.service_id, 8)) == 1
    assert trie.longest_match(ServiceID(b"\xff" + bytes(31))) == 1
