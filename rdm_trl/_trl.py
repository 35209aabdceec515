# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The one place that imports from TRL, most of it from modules that TRL does not document."""

import re

from trl import TrlParser
from trl.trainer.utils import RepeatSampler, get_callable_name, is_async_callable, nanstd


__all__ = ["RepeatSampler", "TrlParser", "get_callable_name", "is_async_callable", "make_parser", "nanstd"]


def make_parser(*dataclass_types: type) -> TrlParser:
    """
    A `TrlParser` whose `--help` shows options under the headings of the dataclasses' docstrings: the lines that begin
    with `> Parameters`. Options that a docstring does not name, inherited ones, stand behind them, under their base.
    """
    parser = TrlParser(dataclass_types, usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]")
    for dataclass_type in dataclass_types:
        names, heading = {}, dataclass_type.__name__
        for line in dataclass_type.__doc__.splitlines():
            if match := re.match(r"\s*> (Parameters .*?)\.?$", line):
                heading = match[1]
            elif match := re.match(r"\s*(\w+) \(`.*:$", line):
                names[match[1]] = heading
        for name in dataclass_type.__dataclass_fields__:
            names.setdefault(name, f"Parameters of {dataclass_type.__bases__[0].__name__}")
        groups = {heading: parser.add_argument_group(heading) for heading in dict.fromkeys(names.values())}
        for action in [action for action in parser._optionals._group_actions if action.dest in names]:
            parser._optionals._group_actions.remove(action)
            groups[names[action.dest]]._group_actions.append(action)
    return parser
