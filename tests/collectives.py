"""What moves between devices, read from a compiled program."""

import math
import re

NAMES = (
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_ITEM = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


def collectives(text):
    """`(name, [(dtype, shape)], devices in a group)` of every collective of a program that moves
    anything. Of one that is started and waited for, the results are those of the wait."""
    pattern = rf"%([\w.-]+) = (.*?) ({'|'.join(NAMES)})(-start)?\((.*)$"
    for label, results, name, started, rest in re.findall(pattern, text, re.MULTILINE):
        if started:
            (results,) = re.findall(rf"= (.*?) {name}-done\([^)]*%{re.escape(label)}[,)]", text)
        shapes = [
            (dtype, tuple(int(n) for n in shape.split(",") if n))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", results)
        ]
        group = _group_size(rest)
        if group > 1:
            yield name, shapes, group


def _group_size(text):
    """Devices in a group: of a list of groups, of a grid, or of some axes of a mesh."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))


def sent(name, shapes, group):
    """Bytes that one device sends in a ring: the usual cost of each collective."""
    total = sum(_ITEM[dtype] * math.prod(shape) for dtype, shape in shapes)
    factor = {"all-gather": 1 / group, "reduce-scatter": 1, "all-to-all": 1 / group}
    return total * (group - 1) * factor[name]
