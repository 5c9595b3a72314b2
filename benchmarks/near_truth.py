"""Every pair of near duplicates of a corpus, found exhaustively, and how a way of finding them compares with it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import xxhash
from scipy.sparse import csr_array

JACCARD = 0.7
WORDS = 5  # in a shingle


def true_pairs(texts: list[str]) -> tuple[Any, Any]:
    """Every pair i < j with a Jaccard similarity of at least 0.7.

    Candidates share one of the rarest shingles, of which each document needs n - ceil(0.7 n) + 1 to miss no pair
    (prefix filtering: Chaudhuri, Ganti and Kaushik 2006); each candidate's intersection is then counted.
    """
    members = _shingle_matrix(texts)
    sizes = np.diff(members.indptr)
    rarity = np.argsort(np.argsort(np.bincount(members.indices), kind="stable"))[members.indices]
    owner = np.repeat(np.arange(len(texts)), sizes)
    order = np.lexsort((rarity, owner))
    place = np.arange(order.size) - members.indptr[owner]
    prefix = order[place <= (sizes - np.ceil(JACCARD * sizes))[owner]]
    rare = csr_array((np.ones(prefix.size, bool), (owner[prefix], members.indices[prefix])), shape=members.shape)
    found = []
    for start in range(0, len(texts), 1000):
        left, right = (rare[start : start + 1000] @ rare.T).nonzero()
        left, right = (left + start)[left + start < right], right[left + start < right]
        for part in (slice(at, at + 20_000) for at in range(0, left.size, 20_000)):
            shared = members[left[part]].multiply(members[right[part]]).sum(axis=1)
            alike = shared >= JACCARD * (sizes[left[part]] + sizes[right[part]] - shared)
            found.append(np.stack([left[part], right[part]])[:, alike])
    pairs = np.concatenate(found, axis=1)
    return pairs[0], pairs[1]


def _shingle_matrix(texts: list[str]) -> Any:
    """(texts, different shingles): 1 where a text holds a shingle."""
    indptr, parts = [0], []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        shingles = {" ".join(words[k : k + WORDS]) for k in range(max(len(words) - WORDS + 1, 1))}
        parts.append(np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, shingles)), np.uint64, len(shingles)))
        indptr.append(indptr[-1] + len(shingles))
    different, indices = np.unique(np.concatenate(parts), return_inverse=True)
    return csr_array((np.ones(indices.size, np.int32), indices, indptr), shape=(len(texts), different.size))


def judge(removed: list[int], pairs: tuple[Any, Any]) -> dict[str, float]:
    """Recall: the share of pairs of which a document was removed; precision: the share of the removed that have one."""
    gone, partnered = np.array(sorted(removed), np.int64), np.union1d(*pairs)
    found = np.isin(pairs[0], gone) | np.isin(pairs[1], gone)
    return {"precision": float(np.isin(gone, partnered).mean()), "recall": float(found.mean())}
