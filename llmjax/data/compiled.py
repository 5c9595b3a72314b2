"""The loops of `shingles` and `dedup` compiled by numba: the same numbers as their numpy forms, to the bit."""

from __future__ import annotations

import numba
import numpy as np

from llmjax.data.shingles import BYTE_CLASSES, GOLDEN, INVERSE, MAX_WORD_BYTES

ALL = EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
U8, U27, U30, U31, U32, U56 = (np.uint64(n) for n in (8, 27, 30, 31, 32, 56))
LOW32 = np.uint64(0xFFFFFFFF)


@numba.njit(inline="always")
def mix(x):
    """See `shingles.mix`."""
    x = (x ^ (x >> U30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> U31)


def hash_words(text, offsets):
    """Hashes of the words of lower-case UTF-8 and each document's place among them."""
    padded = np.concatenate([text, np.zeros(8, np.uint8)])
    eights = np.ndarray((text.size + 1,), "<u8", padded, strides=(1,))  # eight bytes from any place
    return _hash_words(text, offsets, eights)


@numba.njit(cache=True)
def _hash_words(text, offsets, eights):
    hashes = np.empty(text.size + 1, np.uint64)  # first each word's bounds, then its hash
    places = np.zeros(len(offsets), np.int64)
    first, last = np.empty(text.size + 1, np.int32), np.empty(text.size + 1, np.int32)
    count = 0
    for document in range(len(offsets) - 1):
        start, stop = offsets[document], offsets[document + 1]
        if _is_ascii(text, start, stop):
            found = _ascii_bounds(text, start, stop, first, last)
        else:
            found = _bounds(text, start, stop, first, last)
        for word in range(found):
            for at in range(first[word], last[word], MAX_WORD_BYTES):
                hashes[count] = _hash_word(eights, at, min(last[word], at + MAX_WORD_BYTES))
                count += 1
        places[document + 1] = count
    return hashes[:count].copy(), places


@numba.njit(inline="always")
def _is_ascii(text, start, stop):
    together = np.uint8(0)
    for at in range(start, stop):
        together |= text[at]
    return together < 0x80


@numba.njit(inline="always")
def _ascii_bounds(text, start, stop, first, last):
    """Fill `first` and `last` with the words' bounds; no branch depends on the text, which nothing could predict."""
    begun, ended, before = 0, 0, np.uint8(0)
    for at in range(start, stop):
        inside = BYTE_CLASSES[text[at]]
        first[begun] = at
        last[ended] = at
        begun += inside & (1 - before)
        ended += before & (1 - inside)
        before = inside
    last[ended] = stop
    return begun


@numba.njit(inline="always")
def _bounds(text, start, stop, first, last):
    at, count = start, 0
    while at < stop:
        kind = BYTE_CLASSES[text[at]]
        if kind == 0 or kind == 3:
            at += 1 if kind == 0 else 2
        elif kind == 4 and _is_punctuation(text, at, stop):
            at += 3
        else:
            first[count] = at
            at = at + 3 if kind == 2 else _end_of_run(text, at, stop)
            last[count] = at
            count += 1
    return count


@numba.njit(inline="always")
def _is_punctuation(text, at, stop):
    return text[at + 1] == 0x80 or text[at + 1] == 0x81


@numba.njit(inline="always")
def _end_of_run(text, at, stop):
    while at < stop:
        kind = BYTE_CLASSES[text[at]]
        if kind != 1 and not (kind == 4 and not _is_punctuation(text, at, stop)):
            break
        at += 1
    return at


@numba.njit(inline="always")
def _hash_word(eights, start, end):
    size = end - start
    hashed = mix((eights[start] & ALL >> np.uint64(64 - 8 * min(size, 8))) + np.uint64(size) * GOLDEN)
    for at in range(start + 8, end, 8):
        hashed = mix(hashed ^ eights[at] & ALL >> np.uint64(64 - 8 * min(end - at, 8)))
    return hashed


@numba.njit(cache=True)
def hash_runs(words, offsets, size):
    """Hash of each run of `size` words within a document; what is shorter is one run."""
    places = np.zeros(len(offsets), np.int64)
    for document in range(len(offsets) - 1):
        length = offsets[document + 1] - offsets[document]
        places[document + 1] = places[document] + (max(length - size + 1, 1) if length else 0)
    hashes = np.empty(places[-1], np.uint64)
    for document in range(len(offsets) - 1):
        start, stop = offsets[document], offsets[document + 1]
        if start == stop:
            continue
        power, rolling = np.uint64(1), np.uint64(0)
        for k in range(start, min(start + size, stop)):
            rolling += words[k] * power
            power *= GOLDEN
        power *= INVERSE  # the golden multiplier to the size - 1
        out = places[document]
        hashes[out] = mix(rolling)
        for k in range(start + size, stop):
            rolling = (rolling - words[k - size]) * INVERSE + words[k] * power
            out += 1
            hashes[out] = mix(rolling)
    return hashes, places


@numba.njit(cache=True)
def sketch(values, offsets, seeds, sketches):
    """Fill the rows of `sketches` by Fast Similarity Sketching."""
    size = sketches.shape[1]
    for document in range(len(offsets) - 1):
        members, row = values[offsets[document]:offsets[document + 1]], sketches[document]
        filled = 0
        for number in range(len(seeds) if members.size else 0):
            for value in members:
                hashed = mix(np.uint64(value) ^ seeds[number])
                place = np.int64((hashed & LOW32) * np.uint64(size) >> U32) if number < size else number - size
                ranked = np.uint64(number) << U56 | hashed >> U8
                if ranked < row[place]:
                    filled += row[place] == EMPTY
                    row[place] = ranked
            if filled == size:
                break


@numba.njit(cache=True)
def shared(a, b):
    """How many values two sorted sets have in common."""
    i, j, count = 0, 0, 0
    while i < a.size and j < b.size:
        x, y = a[i], b[j]
        count += x == y
        i += x <= y
        j += y <= x
    return count


@numba.njit(cache=True)
def repetition(words, offsets, lengths, sizes, num_top):
    """(documents, sizes) characters: of the most common run for the first `num_top` sizes, else of repeated runs."""
    longest = 0
    for document in range(len(offsets) - 1):
        longest = max(longest, offsets[document + 1] - offsets[document])
    slots = 16
    while slots < 2 * longest:
        slots *= 2
    keys, stamps = np.empty(slots, np.uint64), np.zeros(slots, np.int64)  # a slot holds if its stamp is the current one
    counts, firsts = np.empty(slots, np.int64), np.empty(slots, np.int64)
    chars = np.zeros((len(offsets) - 1, len(sizes)), np.int64)
    stamp = 0
    for document in range(len(offsets) - 1):
        start, stop = offsets[document], offsets[document + 1]
        mask = 16
        while mask < 2 * (stop - start):
            mask *= 2
        mask -= 1
        for column in range(len(sizes)):
            size = sizes[column]
            power = np.uint64(1)
            for _ in range(size - 1):
                power *= GOLDEN
            stamp += 1
            best, best_first, total, skip_to, rolling = 0, -1, 0, start, np.uint64(0)
            rolled = start  # `rolling` covers the words up to here
            for at in range(start, stop - size + 1):
                if rolled == start:
                    weight = np.uint64(1)
                    for k in range(size):
                        rolling += words[start + k] * weight
                        weight *= GOLDEN
                    rolled = start + size
                else:
                    rolling = (rolling - words[at - 1]) * INVERSE + words[at + size - 1] * power
                if at < skip_to:
                    continue
                key = mix(rolling)
                slot = np.int64(key & np.uint64(mask))
                while stamps[slot] == stamp and keys[slot] != key:
                    slot = (slot + 1) & mask
                if stamps[slot] != stamp:
                    stamps[slot], keys[slot], counts[slot], firsts[slot] = stamp, key, 1, at
                else:
                    counts[slot] += 1
                    if column >= num_top:
                        for k in range(size):
                            total += lengths[at + k]
                        skip_to = at + size
                if column < num_top and (counts[slot] > best or counts[slot] == best and firsts[slot] < best_first):
                    best, best_first = counts[slot], firsts[slot]
            if column < num_top and best:
                total = size - 1
                for k in range(size):
                    total += lengths[best_first + k]
                total *= best
            chars[document, column] = total
    return chars
