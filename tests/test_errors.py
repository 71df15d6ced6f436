"""The exception tree that helpers/errors.py draws is the one it defines."""

from __future__ import annotations

import inspect
import re

from helpers import errors


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn, open_at = {}, {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([\s│├└─]*)([A-Z]\w+)(?:\s{2,}|$)", line):
            depth = len(found[1])
            drawn[found[2]] = next((open_at[above] for above in sorted(open_at, reverse=True) if above < depth), "")
            open_at = {above: name for above, name in open_at.items() if above < depth} | {depth: found[2]}
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind.__module__ == errors.__name__]
    defined = {kind.__name__: kind.__bases__[0].__name__ for kind in kinds}
    assert {name: parent for name, parent in drawn.items() if name != "Exception"} == defined
