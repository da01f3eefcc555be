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
    doc: torch.Tensor | None = None  # [programs] int32: document of a segment, N if the segment does not exist
    first: torch.Tensor | None = None  # [N] int32: first segment of a document
    slot: torch.Tensor | None = None  # [N] int32: slot of that first segment, -1 if the document has a single segment
    count: torch.Tensor | None = None  # [N] int32: segments of a document


def cut(B, T, cu_seqlens, length):
    """Segments of `length` tokens over B rows of T tokens, or over the documents of a packed row."""
    per_doc = -(-T // length)
    if cu_seqlens is None:
        slots = B * per_doc if per_doc > 1 else 0
        return Segments(B, length, per_doc, B * per_doc, slots)
    docs = cu_seqlens.shape[0] - 1
    if per_doc == 1:
        return Segments(docs, length, 1, docs, 0)
    programs = docs + T // length
    count = ((cu_seqlens[1:] - cu_seqlens[:-1] + (length - 1)) // length).clamp(min=1)
    end = count.cumsum(0, dtype=torch.int32)
    several = count * (count > 1)
    slot = torch.where(count > 1, several.cumsum(0, dtype=torch.int32) - several, -1)
    index = torch.arange(programs, dtype=torch.int32, device=cu_seqlens.device)
    doc = torch.searchsorted(end, index, right=True, out_int32=True)
    # a document of length l > L has ceil(l / L) <= 2 l / L segments
    slots = 2 * T // length
    return Segments(docs, length, 1, programs, slots, doc, end - count, slot.int(), count.int())


@triton.jit
def locate(i_s, p_cu, p_doc, p_first, p_slot, T, SEGMENT, PER_DOC, PACKED: tl.constexpr, TABLE: tl.constexpr):
    """Segment i_s -> document, batch row, first and last+1 token, state slot (-1: the document is a single segment)."""
    if TABLE:
        i_n = tl.load(p_doc + i_s)
        i_part = i_s - tl.load(p_first + i_n)
        slot = tl.load(p_slot + i_n)
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
