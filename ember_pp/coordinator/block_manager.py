"""Blocks of the paged KV cache: who holds which, and which equal beginnings are shared.

Block ids are global: the same id on every stage. A block is in exactly one of three states:

    free       no one holds it and its content means nothing
    held       ``ref_count >= 1`` sequences have it in their block table
    evictable  no one holds it, but the prefix cache knows its content; reused when it is the
               least recently held and no free block is left

A full block enters the prefix cache under a 128-bit digest of (digest of the block before it,
its token ids), so equal digests mean equal tokens from the first one on. Source: the prefix
caching of vLLM and nano-vllm; the digest is BLAKE2b, which nobody can make collide.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from ember_pp.coordinator.sequence import Sequence

_DIGEST_BYTES = 16


class BlockManager:
    """Hands out the blocks ``0 .. num_blocks - 1`` of ``block_size`` tokens each."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        assert num_blocks >= 1, num_blocks
        assert block_size >= 1, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently held first
        self._block_of_digest: dict[bytes, int] = {}
        self._digest_of_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks whose content the prefix cache knows, held ones included."""
        return len(self._block_of_digest)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that hold the beginning of the sequence's known tokens.

        Never the block of the last known token, even when its content is cached: at least one
        token is left to compute, or there would be no row to sample from.
        """
        if not self.prefix_caching:
            return []
        num_full_blocks = (sequence.num_tokens - 1) // self.block_size
        matched: list[int] = []
        for index in range(num_full_blocks):
            block = self._block_of_digest.get(self._digest(sequence, index))
            if block is None:
                break
            matched.append(block)
        return matched

    def can_allocate(self, sequence: Sequence, *, headroom: int = 0) -> bool:
        """True if ``allocate`` would succeed and leave ``headroom`` blocks to hand out."""
        matched = self.match_prefix(sequence)
        num_new = self.num_blocks_for(sequence.num_tokens) - len(matched)
        num_revived = sum(block in self._evictable for block in matched)
        return num_new + num_revived + headroom <= self.num_free

    def allocate(self, sequence: Sequence) -> int:
        """Give blocks for all known tokens; the number of tokens that need no computing.

        ``can_allocate`` must have said yes.
        """
        assert not sequence.block_table, f"{sequence} holds blocks already"
        matched = self.match_prefix(sequence)
        for block in matched:
            self._hold(block)
        num_new = self.num_blocks_for(sequence.num_tokens) - len(matched)
        sequence.block_table = matched + [self._take() for _ in range(num_new)]
        sequence.num_published_blocks = len(matched)
        return len(matched) * self.block_size

    def append(self, sequence: Sequence) -> int | None:
        """Give the sequence one more block, or None when there is none to hand out."""
        if not self.num_free:
            return None
        block = self._take()
        sequence.block_table.append(block)
        return block

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others share the full blocks of the first ``num_tokens`` tokens.

        The tokens must be known, and the plans that compute them issued: stages execute plans
        in order, so every later plan may read the blocks. Where equal content is cached
        already, the sequence's own copy stays private.
        """
        if not self.prefix_caching:
            return
        for index in range(sequence.num_published_blocks, num_tokens // self.block_size):
            digest = self._digest(sequence, index)
            block = sequence.block_table[index]
            if digest not in self._block_of_digest:
                self._block_of_digest[digest] = block
                self._digest_of_block[block] = digest
            sequence.num_published_blocks = index + 1

    def free(self, sequence: Sequence) -> None:
        """Take back all blocks of the sequence; published content stays until it is evicted.

        Last block first: the end of a prompt is evicted before the beginning that others
        are more likely to share.
        """
        for block in reversed(sequence.block_table):
            self._release(block)
        sequence.block_table = []
        sequence.num_published_blocks = 0

    def _hold(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._evictable[block]
        self._ref_counts[block] += 1

    def _release(self, block: int) -> None:
        self._ref_counts[block] -= 1
        assert self._ref_counts[block] >= 0, f"block {block} freed twice"
        if self._ref_counts[block]:
            return
        if block in self._digest_of_block:
            self._evictable[block] = None
        else:
            self._free.append(block)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._block_of_digest[self._digest_of_block.pop(block)]
        assert self._ref_counts[block] == 0, f"block {block} is handed out while held"
        self._ref_counts[block] = 1
        return block

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        digests = sequence.block_digests
        while len(digests) <= index:
            start = len(digests) * self.block_size
            token_ids = sequence.token_ids(start, start + self.block_size)
            assert len(token_ids) == self.block_size, "a digest of tokens not known yet"
            parent = digests[-1] if digests else b""
            digests.append(
                hashlib.blake2b(parent + token_ids.tobytes(), digest_size=_DIGEST_BYTES).digest()
            )
        return digests[index]
