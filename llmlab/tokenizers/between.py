"""Special tokens for the models that do not handle them themselves: cut them out, and treat what is between as text."""

import re
from collections.abc import Callable, Mapping
from itertools import groupby


def encode_between(
    texts: list[str], special: Mapping[str, int], encode: Callable[[list[str]], list[list[int]]]
) -> list[list[int]]:
    """Ids of texts in which the names of special tokens stand for those tokens; the longest name wins.

    `encode` is called once, with all the text in between, and so can use all its threads.
    """
    if not special:
        return encode(texts)
    names = sorted(special, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
    parts = [pattern.split(text) for text in texts]  # text, name, text, name, ..., text
    plain = iter(encode([part for row in parts for part in row[::2]]))
    rows: list[list[int]] = []
    for row in parts:
        ids: list[int] = []
        for number, part in enumerate(row):
            if number % 2:
                ids.append(special[part])
            else:
                ids += next(plain)
        rows.append(ids)
    return rows


def decode_between(
    batch: list[list[int]],
    special: Mapping[int, str],
    skip_special_tokens: bool,
    decode: Callable[[list[list[int]]], list[str]],
) -> list[str]:
    """Texts of rows with special tokens, which are left out or appear by name. `decode` is called once."""
    if skip_special_tokens:
        return decode([[index for index in row if index not in special] for row in batch])
    parts = [[(named, list(ids)) for named, ids in groupby(row, special.__contains__)] for row in batch]
    plain = iter(decode([ids for row in parts for named, ids in row if not named]))
    return [
        "".join("".join(special[index] for index in ids) if named else next(plain) for named, ids in row)
        for row in parts
    ]
