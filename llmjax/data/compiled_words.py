"""The words of `words.pieces` found by loops that numba compiles: from UTF-8 to each word's hash, length and kind."""

from __future__ import annotations

import numba
import numpy as np

from llmjax.data.compiled import mix
from llmjax.data.words import (
    BEFORE_POINT,
    DIGIT,
    IS_ALPHA,
    LETTER,
    PREFIX,
    SPACE,
    STOP_WORDS,
    SUFFIX,
    SYMBOL,
    UNITS,
    character_kinds,
)

MULTIPLIER = np.uint64(0x100000001B3)
KINDS = character_kinds()


def _plain_hash(word: str) -> int:
    value = 0xCBF29CE484222325
    for character in word:
        value = (value ^ ord(character)) * int(MULTIPLIER) & (1 << 64) - 1
    return value


STOP_HASHES = np.array([_plain_hash(word) for word in STOP_WORDS], np.uint64)
CANNOT = np.array([_plain_hash("cannot"), _plain_hash("Cannot")], np.uint64)
CANNOT_LENGTH = 6
_UNIT_LIST = sorted(UNITS, key=len, reverse=True)
UNIT_CHARACTERS = np.array([[ord(c) for c in unit.ljust(4, "\0")] for unit in _UNIT_LIST], np.int32)
UNIT_LENGTHS = np.array([len(unit) for unit in _UNIT_LIST], np.int64)
_HTTP, _HTTPS, _WWW = (np.array([ord(c) for c in start], np.int32) for start in ("http://", "https://", "www."))


@numba.njit(cache=True)
def read_words(data, offsets):
    """(hashes, lengths, kinds) of the words of UTF-8 texts, and each text's place among them."""
    size = data.size + 1
    hashes, lengths = np.empty(size, np.uint64), np.empty(size, np.int64)
    kinds, places = np.empty(size, np.int64), np.zeros(len(offsets), np.int64)
    text, kind = np.empty(size, np.int32), np.empty(size, np.uint8)
    starts, stops = np.empty(size, np.int64), np.empty(size, np.int64)
    after = np.empty((size, 2), np.int64)
    count = 0
    for row in range(len(offsets) - 1):
        length = _decode(data, offsets[row], offsets[row + 1], text, kind)
        at, found = 0, 0
        while at < length:
            if kind[at] & SPACE:
                at += 1
                continue
            stop, every = at, np.uint8(IS_ALPHA)
            while stop < length and not kind[stop] & SPACE:
                every &= kind[stop]
                stop += 1
            if every and stop - at != CANNOT_LENGTH:
                starts[found], stops[found] = at, stop
                found += 1
            else:
                found = _pieces(text, kind, at, stop, starts, stops, found, after)
            at = stop
        for word in range(found):
            hashes[count], lengths[count] = _hash(text, starts[word], stops[word]), stops[word] - starts[word]
            kinds[count] = _kind(kind, starts[word], stops[word], hashes[count])
            hashes[count] = mix(hashes[count])
            count += 1
        places[row + 1] = count
    return hashes[:count].copy(), lengths[:count].copy(), kinds[:count].copy(), places


@numba.njit(inline="always")
def _decode(data, start, stop, text, kind):
    """Code points and their kinds; returns how many."""
    at, count = start, 0
    while at < stop:
        byte = np.int32(data[at])
        if byte < 0x80:
            value, width = byte, 1
        elif byte < 0xE0:
            value, width = (byte & 0x1F) << 6 | data[at + 1] & 0x3F, 2
        elif byte < 0xF0:
            value, width = (byte & 0x0F) << 12 | (data[at + 1] & 0x3F) << 6 | data[at + 2] & 0x3F, 3
        else:
            value = ((byte & 0x07) << 18 | (data[at + 1] & 0x3F) << 12 | (data[at + 2] & 0x3F) << 6
                     | data[at + 3] & 0x3F)  # fmt: skip
            width = 4
        text[count] = value
        kind[count] = KINDS[value] if value < KINDS.size else 0
        count += 1
        at += width
    return count


@numba.njit(inline="always")
def _hash(text, start, stop):
    value = np.uint64(0xCBF29CE484222325)
    for at in range(start, stop):
        value = (value ^ np.uint64(text[at])) * MULTIPLIER
    return value


@numba.njit(inline="always")
def _kind(kind, start, stop, hashed):
    every, some = np.uint8(0xFF), np.uint8(0)
    for at in range(start, stop):
        every &= kind[at]
        some |= kind[at]
    result = np.int64(1 if every & SYMBOL else 0) | np.int64(2 if some & IS_ALPHA else 0)
    for number in range(STOP_HASHES.size):
        if STOP_HASHES[number] == hashed:
            result |= 4 * (number + 1)
    return result


@numba.njit(forceinline=True)
def _pieces(text, kind, start, stop, starts, stops, count, after):
    """Append the words of one run between blanks, as `words.pieces` parts it."""
    if stop - start == CANNOT_LENGTH and _hash(text, start, stop) in CANNOT:
        starts[count], stops[count] = start, stop - 3
        starts[count + 1], stops[count + 1] = stop - 3, stop
        return count + 2
    num_after = 0
    address = _address_stop(text, start, stop)
    while start < stop and address < 0:
        width = _prefix(text, kind, start, stop)
        if width:
            starts[count], stops[count] = start, start + width
            count += 1
            start += width
        else:
            width = _suffix(text, kind, start, stop)
            if not width:
                break
            after[num_after, 0], after[num_after, 1] = stop - width, stop
            num_after += 1
            stop -= width
        address = _address_stop(text, start, stop)
    if address >= 0:
        starts[count], stops[count] = start, address
        count += 1
        for at in range(address, stop):
            starts[count], stops[count] = at, at + 1
            count += 1
    else:
        count = _middle(text, kind, start, stop, starts, stops, count)
    for place in range(num_after - 1, -1, -1):
        starts[count], stops[count] = after[place, 0], after[place, 1]
        count += 1
    return count


@numba.njit(inline="always")
def _begins(text, start, stop, with_):
    same = stop - start > with_.size
    for k in range(with_.size if same else 0):
        same = same and text[start + k] == with_[k]
    return same


@numba.njit(forceinline=True)
def _address_stop(text, start, stop):
    """Where an address that begins here stops, its closing punctuation left out; -1 where none begins."""
    if start >= stop or (text[start] != 104 and text[start] != 119):
        return -1
    head = 0
    if _begins(text, start, stop, _HTTP):
        head = 7
    elif _begins(text, start, stop, _HTTPS):
        head = 8
    elif _begins(text, start, stop, _WWW):
        head = 4
    if not head:
        return -1
    while stop > start + head + 1 and _closes(text[stop - 1]):
        stop -= 1
    return stop


@numba.njit(inline="always")
def _closes(c):
    return c == 44 or c == 46 or c == 59 or c == 58 or c == 33 or c == 63 or c == 41 or c == 93 or c == 125 or (
        c == 62 or c == 34 or c == 39)  # fmt: skip


@numba.njit(forceinline=True)
def _prefix(text, kind, start, stop):
    """Characters of the word that punctuation at the front makes; 0 for none."""
    dots = start
    while dots < stop and text[dots] == 46:
        dots += 1
    if dots - start >= 2:
        return dots - start
    if kind[start] & PREFIX:
        return 1
    return 1 if text[start] == 43 and not (start + 1 < stop and kind[start + 1] & DIGIT) else 0


@numba.njit(forceinline=True)
def _suffix(text, kind, start, stop):
    """Characters of the word that the end makes: dots, 's, punctuation, a unit after a digit; 0 for none."""
    dots = stop
    while dots > start and text[dots - 1] == 46:
        dots -= 1
    if stop - dots >= 2:
        return stop - dots
    last = text[stop - 1]
    if stop - start >= 2 and (last == 115 or last == 83) and (text[stop - 2] == 39 or text[stop - 2] == 0x2019):
        return 2
    digits = np.uint8(0)
    for at in range(max(start, stop - 5), stop - 1):
        digits |= kind[at]
    for unit in range(UNIT_LENGTHS.size if digits & DIGIT else 0):
        size = UNIT_LENGTHS[unit]
        if stop - size > start and kind[stop - size - 1] & DIGIT:
            same = True
            for k in range(size):
                same = same and text[stop - size + k] == UNIT_CHARACTERS[unit, k]
            if same:
                return size
    if kind[stop - 1] & SUFFIX:
        return 1
    if stop - start < 2:
        return 0
    before = text[stop - 2]
    if last == 43 and kind[stop - 2] & DIGIT:
        return 1
    if last == 46 and kind[stop - 2] & BEFORE_POINT:
        return 1
    capitals = stop - start >= 3 and 65 <= before <= 90 and 65 <= text[stop - 3] <= 90
    return 1 if last == 46 and capitals else 0


@numba.njit(forceinline=True)
def _middle(text, kind, start, stop, starts, stops, count):
    parted = _contraction(text, kind, start, stop)
    if parted > start:
        starts[count], stops[count] = start, parted
        starts[count + 1], stops[count + 1] = parted, stop
        return count + 2
    begin, at = start, start
    while at < stop:
        width = 0 if kind[at] & (LETTER | DIGIT) else _infix(text, kind, start, at, stop)
        if not width:
            at += 1
            continue
        if begin < at:
            starts[count], stops[count] = begin, at
            count += 1
        starts[count], stops[count] = at, at + width
        count += 1
        at += width
        begin = at
    if begin < stop:
        starts[count], stops[count] = begin, stop
        count += 1
    return count


@numba.njit(inline="always")
def _lower(c):
    return c + 32 if 65 <= c <= 90 else c


@numba.njit(forceinline=True)
def _contraction(text, kind, start, stop):
    """Where n't, 'll, 're, 've, 'd or 'm begins at the end of letters, digits and underscores; -1 where it does not."""
    quote = -1
    for at in range(start, stop):
        if text[at] == 39 or text[at] == 0x2019:
            quote = at
            break
        if not (kind[at] & (LETTER | DIGIT) or text[at] == 95):
            return -1
    if quote <= start or stop - quote > 3 or stop - quote < 2:
        return -1
    first = _lower(text[quote + 1])
    if stop - quote == 2:
        if first == 116 and quote - start >= 2 and _lower(text[quote - 1]) == 110:
            return quote - 1
        return quote if first == 100 or first == 109 else -1
    second = _lower(text[quote + 2])
    ends = first == 108 and second == 108 or (first == 114 or first == 118) and second == 101
    return quote if ends else -1


@numba.njit(inline="always")
def _is_letter(kind, at, start, stop):
    return start <= at < stop and kind[at] & LETTER != 0


@numba.njit(inline="always")
def _is_digit(kind, at, start, stop):
    return start <= at < stop and kind[at] & DIGIT != 0


@numba.njit(forceinline=True)
def _infix(text, kind, start, at, stop):
    """Characters of the word that punctuation inside of a run makes here; 0 for none."""
    c = text[at]
    if c == 46:
        dots = at
        while dots < stop and text[dots] == 46:
            dots += 1
        if dots - at >= 2:
            return dots - at
        sentence = at > start and at + 1 < stop and 97 <= text[at - 1] <= 122 and 65 <= text[at + 1] <= 90
        return 1 if sentence else 0
    if c == 0x2026:
        return 1
    if (c == 43 or c == 45 or c == 42 or c == 94) and _is_digit(kind, at - 1, start, stop) and (
            _is_digit(kind, at + 1, start, stop) or at + 1 < stop and text[at + 1] == 45):  # fmt: skip
        return 1
    before = _is_letter(kind, at - 1, start, stop)
    if c == 45 and before:
        dashes = at
        while dashes < stop and dashes < at + 3 and text[dashes] == 45:
            dashes += 1
        return dashes - at if _is_letter(kind, dashes, start, stop) else 0
    if c == 44 or c == 0x2014 or c == 0x2013 or c == 126:
        return 1 if before and _is_letter(kind, at + 1, start, stop) else 0
    if c == 58 or c == 60 or c == 62 or c == 61 or c == 47:
        joined = before or _is_digit(kind, at - 1, start, stop)
        return 1 if joined and _is_letter(kind, at + 1, start, stop) else 0
    return 0
