"""Blocks come back, whoever shared them; and a block that is found by its key holds what the key says."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmlab.infer.engine.blocks import Blocks, Copy, OutOfBlocks, Table, keys_of

SIZE, NUM = 4, 12
SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Memory(RuleBasedStateMachine):
    """Random rows over few blocks; `content` is what a device would hold, `rows` what every row must read back."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(NUM, SIZE)
        self.content: dict[int, list[int]] = {block: [-1] * SIZE for block in range(NUM)}
        self.rows: list[tuple[Table, list[int]]] = []

    def write(self, table: Table, text: list[int], new: list[int]) -> None:
        """Appends to a row as the engine does: blocks first, then copies, then positions."""
        try:
            copies = table.grow(table.length + len(new))
        except OutOfBlocks:
            assert table.needs(table.length + len(new)) > self.blocks.num_free
            return
        for copy in copies:
            self.content[copy.target] = list(self.content[copy.source])
        for token in new:
            block = table.blocks[table.length // SIZE]
            assert self.blocks.count(block) == 1, "a shared block is written to"
            self.content[block][table.length % SIZE] = token
            table.length += 1
            text.append(token)

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from(["", "other"]))
    def admit(self, text: list[int], salt: str) -> None:
        table = Table(self.blocks, salt)
        keys = keys_of(text[:-1], SIZE, salt)
        found = self.blocks.find(keys)
        for index, block in enumerate(found):
            assert self.content[block] == text[index * SIZE : (index + 1) * SIZE]
        table.adopt(found, keys[: len(found)])
        written = text[: table.length]
        self.rows.append((table, written))
        self.write(table, written, text[table.length :])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), max_size=6), keep=st.booleans())
    def append(self, data: st.DataObject, new: list[int], keep: bool) -> None:
        table, text = data.draw(st.sampled_from(self.rows))
        self.write(table, text, new)
        if keep:
            table.keep(text, len(text))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, text = data.draw(st.sampled_from(self.rows))
        self.rows.append((table.fork(), list(text)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), preempt=st.booleans())
    def leave(self, data: st.DataObject, preempt: bool) -> None:
        index = data.draw(st.integers(0, len(self.rows) - 1))
        table, text = self.rows.pop(index)
        table.free()
        assert (table.blocks, table.length) == ([], 0)
        if preempt and text:  # it comes back and finds what is left of it
            self.admit([*text, 0], table.salt)

    @invariant()
    def counts_are_the_tables_that_list_a_block(self) -> None:
        for block in range(NUM):
            assert self.blocks.count(block) == sum(table.blocks.count(block) for table, _ in self.rows)
        used = sum(self.blocks.count(block) > 0 for block in range(NUM))
        assert used + self.blocks.num_free == NUM
        assert 0 <= self.blocks.num_cached <= self.blocks.num_free

    @invariant()
    def every_row_reads_its_own_text(self) -> None:
        for table, text in self.rows:
            assert table.length == len(text)
            stored = [token for block in table.blocks for token in self.content[block]]
            assert stored[: len(text)] == text

    def teardown(self) -> None:
        for table, _ in self.rows:
            table.free()
        self.rows = []
        assert self.blocks.num_free == NUM
        assert all(self.blocks.count(block) == 0 for block in range(NUM))
        taken = self.blocks.take(NUM)  # nothing was lost on the way
        assert sorted(taken) == list(range(NUM))


TestMemory = Memory.TestCase
TestMemory.settings = SETTINGS


def row(blocks: Blocks, text: list[int], salt: str = "") -> Table:
    table = Table(blocks, salt)
    table.grow(len(text))
    table.length = len(text)
    table.keep(text, len(text))
    return table


def test_a_prefix_is_found_up_to_its_last_full_block_and_under_its_salt_alone():
    blocks, text = Blocks(NUM, SIZE), list(range(10))
    table = row(blocks, text)
    assert blocks.find(keys_of(text, SIZE)) == table.blocks[:2]
    assert blocks.find(keys_of([*text[:5], 99, *text[6:]], SIZE)) == table.blocks[:1]
    assert blocks.find(keys_of([99, *text[1:]], SIZE)) == []  # an equal second block after another first one
    assert blocks.find(keys_of(text, SIZE, "tenant")) == []


def test_what_was_used_last_is_forgotten_last_and_ends_before_beginnings():
    blocks = Blocks(4, SIZE)
    old, new = row(blocks, [1] * 8), row(blocks, [2] * 8)
    old.free()
    new.free()
    assert (blocks.num_free, blocks.num_cached) == (4, 4)
    blocks.take(1)
    assert len(blocks.find(keys_of([1] * 8, SIZE))) == 1  # its end is gone, its beginning is there
    blocks.take(1)
    assert blocks.find(keys_of([1] * 8, SIZE)) == []
    assert len(blocks.find(keys_of([2] * 8, SIZE))) == 2


def test_who_writes_into_a_shared_block_copies_it_and_the_last_one_keeps_it():
    blocks = Blocks(NUM, SIZE)
    one = row(blocks, [0] * 6)
    two, three = one.fork(), one.fork()
    shared = one.blocks[1]
    assert one.grow(7) == [Copy(shared, one.blocks[1])]
    assert two.grow(7) == [Copy(shared, two.blocks[1])]
    assert three.grow(7) == []
    assert three.blocks[1] == shared
    assert one.blocks[0] == two.blocks[0] == three.blocks[0]
    assert len({one.blocks[1], two.blocks[1], three.blocks[1]}) == 3


def test_what_does_not_fit_changes_nothing():
    blocks = Blocks(3, SIZE)
    table = row(blocks, [0] * 6)
    fork = table.fork()
    with pytest.raises(OutOfBlocks, match="2 blocks are needed and 1 are free"):
        fork.grow(9)
    assert (fork.blocks, blocks.num_free) == (table.blocks, 1)


def test_forgetting_keeps_the_blocks():
    blocks = Blocks(3, SIZE)
    row(blocks, [0] * 8).free()
    blocks.forget()
    assert (blocks.num_free, blocks.num_cached, blocks.find(keys_of([0] * 8, SIZE))) == (3, 0, [])
