# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Cuts every document (a batch row, or a piece of a packed batch) into segments that programs work on side by side.

A document of one segment needs nothing else. A document of several has one state slot per segment: partial sums are
written there, a scan turns them into the state each segment starts from, then all segments run at once.
Nothing here reads a GPU value on the host: sizes are bounds that hold for every cu_seqlens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Segments(NamedTuple):
    docs: int  # N
    length: int  # tokens per segment, a multiple of the chunk
    per_doc: int  # segments of each document (equal lengths), or 1
    programs: int  # upper bound on the number of segments
    slots: int  # upper bound on the number of state slots; 0: no document is cut
    has_table: bool  # documents of different lengths are cut: `cut_table` says where


def cut(B, T, cu_seqlens, length):
    """Segments of `length` tokens over B rows of T tokens, or over the documents of a packed row."""
    per_doc = -(-T // length)
    if cu_seqlens is None:
        slots = B * per_doc if per_doc > 1 else 0
        return Segments(B, length, per_doc, B * per_doc, slots, False)
    docs = cu_seqlens.shape[0] - 1
    if per_doc == 1:
        return Segments(docs, length, 1, docs, 0, False)
    # a document of length l > L has ceil(l / L) <= 2 l / L segments
    return Segments(docs, length, 1, docs + T // length, 2 * T // length, True)


def cut_table(segments, cu_seqlens):
    """-> int32 [3 N + programs]: for each document its first segment, the state slot of that segment (-1 if it is the
    only one) and how many it has; then for each segment its document, N if the segment does not exist."""
    table = torch.empty(3 * segments.docs + segments.programs, dtype=torch.int32, device=cu_seqlens.device)
    cut_table_kernel[(1,)](cu_seqlens, table, segments.docs, segments.length, segments.programs, BLOCK=256, num_warps=4)
    return table


@triton.jit(do_not_specialize=["N", "SEGMENT", "PROGRAMS"])
def cut_table_kernel(p_cu, p_cut, N, SEGMENT, PROGRAMS, BLOCK: tl.constexpr):
    """One program writes the table, a block of documents after the other."""
    o_n = tl.arange(0, BLOCK)
    segments = 0
    slots = 0
    for i in range(tl.cdiv(N, BLOCK)):
        i_n = i * BLOCK + o_n
        m_n = i_n < N
        # [BLOCK]
        b_length = tl.load(p_cu + i_n + 1, mask=m_n, other=0) - tl.load(p_cu + i_n, mask=m_n, other=0)
        b_count = tl.where(m_n, tl.maximum((b_length + SEGMENT - 1) // SEGMENT, 1), 0)
        b_slots = tl.where(b_count > 1, b_count, 0)
        b_first = segments + tl.cumsum(b_count, axis=0) - b_count
        b_slot = slots + tl.cumsum(b_slots, axis=0) - b_slots
        tl.store(p_cut + i_n, b_first, mask=m_n)
        tl.store(p_cut + N + i_n, tl.where(b_count > 1, b_slot, -1), mask=m_n)
        tl.store(p_cut + 2 * N + i_n, b_count, mask=m_n)
        for part in range(tl.max(b_count, axis=0)):
            tl.store(p_cut + 3 * N + b_first + part, i_n, mask=part < b_count)
        segments += tl.sum(b_count, axis=0)
        slots += tl.sum(b_slots, axis=0)
    for i in range(tl.cdiv(PROGRAMS - segments, BLOCK)):
        i_s = segments + i * BLOCK + o_n
        tl.store(p_cut + 3 * N + i_s, tl.zeros([BLOCK], dtype=tl.int32) + N, mask=i_s < PROGRAMS)


@triton.jit
def locate(i_s, p_cu, p_cut, T, N, SEGMENT, PER_DOC, PACKED: tl.constexpr, TABLE: tl.constexpr):
    """Segment i_s -> document, batch row, first and last+1 token, state slot (-1: the document is a single segment)."""
    if TABLE:
        i_n = tl.load(p_cut + 3 * N + i_s)
        i_part = i_s - tl.load(p_cut + i_n)
        slot = tl.load(p_cut + N + i_n)
        slot = tl.where(slot < 0, -1, slot + i_part)
    else:
        i_n = i_s // PER_DOC
        i_part = i_s % PER_DOC
        slot = tl.where(PER_DOC > 1, i_s, -1)
    if PACKED:
        i_b = i_n * 0
        bos = tl.load(p_cu + i_n)
        eos = tl.load(p_cu + i_n + 1)
    else:
        i_b = i_n
        bos = i_n * 0
        eos = T
    start = bos + i_part * SEGMENT
    end = tl.minimum(start + SEGMENT, eos)
    return i_n, i_b, start, end, slot, i_part == 0, end == eos


@triton.jit
def exists(o_c, left, p_mask, HAS_MASK: tl.constexpr):
    """[BLOCK_C] bool: the token lies in the segment, of which `left` are left, and is not masked."""
    m_t = o_c < left
    if HAS_MASK:
        m_t = m_t & (tl.load(p_mask + o_c, mask=m_t, other=0) != 0)
    return m_t
