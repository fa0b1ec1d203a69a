"""Command lines without the password of their --storage."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def without_password(words: Sequence[str], storage: str | None) -> str:
    """The command line, without the password of its storage; nor is it left where provenance records it.

    Raises:
        ValueError: the storage is no address.
    """
    if storage is None:
        return shlex.join(words)
    from llmlab.study.storage import shown, storage_url

    hidden = shown(storage_url(Path(), storage))
    sys.argv = [word.replace(storage, hidden) for word in sys.argv]
    return shlex.join([word.replace(storage, hidden) for word in words])
