"""What the docstring of every public name must say, as far as a program can check it.

Each rule is a function that returns how a name breaks it, and one test that lists all such names.
A docstring may refer to another: "as for `X`" or "as `X` does" takes over what `X` says.
"""

import ast
import dataclasses
import doctest
import functools
import inspect
import re
import textwrap
import typing

import pytest
from jaxtyping import AbstractArray

import braidax as bx

LONGEST_SENTENCE = 25
# Compositions of the others, without an equation or a format of their own.
WITHOUT_SOURCE = {
    *("AbstractExperts", "AbstractRouter", "Experts", "FeedForward", "MoEConfig.tiny", "Routing"),
    *("MoEConfig.is_hash_layer", "RoutedMoE.from_config", "RoutedAndSharedMoE.from_config"),
    *("cast", "dead_experts", "decay_mask", "expert_load", "hash_tables.from_array"),
    *("load_entropy", "plan", "routers", "trainable"),
}
# What moves rows, multiplies them or draws has no equation either.
WITHOUT_EQUATIONS = ("braidax._dispatch", "braidax._inspect", "braidax._matmul")
KERNELS = "braidax._matmul"  # their author reads the annotations
SPACES = ("activations", "hash_tables", "matmul")


def unwrapped(value):
    value = value.fget if isinstance(value, property) else value
    return inspect.unwrap(getattr(value, "__func__", value))


def public_names():
    """`{dotted name: object}` of what a user is told about, with the methods of every class.

    A method is told about where it is first declared. `training` is a program, to be read as such.
    """
    modules = {n: m for n, m in vars(bx).items() if inspect.ismodule(m) and n in SPACES}
    found = {n: v for n, v in vars(bx).items() if not inspect.ismodule(v)}
    for prefix, module in modules.items():
        places = (module.__name__, f"braidax._{prefix}.")  # not what the module imports
        members = {n: v for n, v in vars(module).items() if is_ours(v)}
        found |= {f"{prefix}.{n}": v for n, v in members.items() if v.__module__.startswith(places)}
    for owner, value in list(found.items()):
        for name, member in vars(value).items() if inspect.isclass(value) else ():
            first = not any(name in vars(base) for base in value.__mro__[1:])
            if first and is_ours(unwrapped(member)):
                found[f"{owner}.{name}"] = member
    hidden = re.compile(r"(^|\.)_(?!_call__)")
    return {name: value for name, value in found.items() if not hidden.search(name)}


def is_ours(value):
    return callable(value) and getattr(value, "__module__", "").startswith("braidax")


PUBLIC = public_names()


def owner_of(name):
    return name.rpartition(".")[0]


def own_text(name):
    """The docstring, and for a class also that of its construction."""
    value = PUBLIC[name]
    text = inspect.getdoc(unwrapped(value)) or ""
    if not inspect.isclass(value):
        return text
    # A dataclass without a docstring is given its signature for one, `__init__` a general phrase.
    text = "" if text.startswith(f"{value.__name__}(") else text
    construction = inspect.getdoc(value.__init__) or ""
    return text + "\n\n" + construction.removeprefix("Initialize self.")


@functools.cache
def full_text(name):
    """What a reader of `name` is told, references to other names followed."""
    text = own_text(name)
    for other in re.findall(r"\b[Aa]s\s(?:for\s|in\s)?`([\w.]+)`", text):
        near = (other, f"{owner_of(name)}.{other}", f"{name.partition('.')[0]}.{other}")
        text += "".join("\n\n" + full_text(full) for full in near if full in PUBLIC)
    return text + ("\n\n" + own_text(owner_of(name)) if name.endswith(".__call__") else "")


def annotations(name):
    """`{argument or field: annotation}`, and what is returned as `return`."""
    value, found = PUBLIC[name], {}
    function = value.__init__ if inspect.isclass(value) else unwrapped(value)
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        found = {field.name: field.type for field in dataclasses.fields(value)}
    signature = inspect.signature(function)
    found |= {p.name: p.annotation for p in signature.parameters.values()}
    found["return"] = signature.return_annotation
    return {key: kind for key, kind in found.items() if key not in ("self", "cls")}


def shapes(annotation):
    """`(*layers, experts)` for every array with axes in an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        axes = annotation.dim_str.split()
        shape = f"({axes[0]},)" if len(axes) == 1 else f"({', '.join(axes)})"
        return {shape} if axes and not {"...", "_"} & set(axes) else set()
    return {shape for part in typing.get_args(annotation) for shape in shapes(part)}


def raised(function, seen):
    """The exceptions that a function raises, or a function of the library that it calls by name."""
    function = unwrapped(function)
    if inspect.isclass(function):
        methods = vars(function).keys() & {"__init__", "__post_init__", "__check_init__"}
        return {error for name in methods for error in raised(vars(function)[name], seen)}
    code = getattr(function, "__code__", None)
    if code is None or code in seen or not function.__module__.startswith("braidax"):
        return set()
    seen.add(code)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # generated, as the __init__ of a dataclass
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found |= set(re.findall(r"^\w+Error\b", ast.unparse(node.exc)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            found |= raised(function.__globals__.get(node.func.id), seen)
    return found


def examples(name):
    """The source of the doctests of a name and of its class."""
    texts = [own_text(each) for each in (name, owner_of(name)) if each in PUBLIC]
    parser = doctest.DocTestParser()
    return "\n".join(e.source for text in texts for e in parser.get_examples(text))


def sentences(text):
    """The sentences of a docstring without its examples, lists taken item by item."""
    prose = re.sub(r"^(?:    |>>>|\|).*\n?", "\n\n", text, flags=re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n(?=[-*] )", prose)
    return [s for block in blocks for s in re.split(r"(?<=[.:?!])\s+", block) if s.strip()]


def no_docstring(name):
    return not own_text(name).strip()


def no_example(name):
    """Only a subclass of a router or of experts has to write the members of their bases."""
    short = name.rpartition(".")[2]
    used = re.search(r"\w" if short == "__call__" else rf"\b{short}\b", examples(name))
    kernel = unwrapped(PUBLIC[name]).__module__.startswith(KERNELS)
    return not (used or owner_of(name).startswith("Abstract") or kernel)


def unnamed_arguments(name):
    """Arguments and fields that stand nowhere in backticks."""
    wanted, text = annotations(name).keys() - {"return", "args", "kwargs"}, full_text(name)
    if inspect.isclass(PUBLIC[name]) and "all others: the arguments of the construct" in text:
        wanted &= inspect.signature(PUBLIC[name].__init__).parameters.keys()
    return wanted - set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", text))))


def untold_shapes(name):
    """A random key's shape depends on how the key was made."""
    kinds = [kind for key, kind in annotations(name).items() if key != "key"]
    if unwrapped(PUBLIC[name]).__module__.startswith(KERNELS):
        return set()
    return {shape for kind in kinds for shape in shapes(kind) if shape not in full_text(name)}


def untold_exceptions(name):
    """A property reads what was checked at construction."""
    wanted = set() if isinstance(PUBLIC[name], property) else raised(PUBLIC[name], set())
    return {kind for kind in wanted | {"**Raises:**"} if wanted and kind not in full_text(name)}


def no_source(name):
    """The published equation, format or reference file that the code implements."""
    value, owner = unwrapped(PUBLIC[name]), owner_of(name)
    text = full_text(name) + (full_text(owner) if owner in PUBLIC else "")
    cited = "**Source:**" in text or "arXiv" in (inspect.getmodule(value).__doc__ or "")
    exempt = {name, owner} & WITHOUT_SOURCE or value.__module__.startswith(WITHOUT_EQUATIONS)
    return not (cited or exempt)


def eaten_by_markdown(name):
    """A prompt outside of an indented block becomes a nested quotation, and a list right below a
    paragraph becomes a part of it."""
    return re.findall(r"^>>>.*|^[\w*`].*\n- ", own_text(name), re.MULTILINE)


def long_sentences(name):
    return [s for s in sentences(own_text(name)) if len(s.split()) > LONGEST_SENTENCE]


RULES = (
    *(no_docstring, no_example, unnamed_arguments, untold_shapes, untold_exceptions),
    *(no_source, eaten_by_markdown, long_sentences),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_name_breaks(rule):
    assert {name: broken for name in PUBLIC if (broken := rule(name))} == {}


def test_the_public_names_and_their_code_are_read():
    assert {"Routing", "hash_tables.md5", "MoEConfig.from_hf", "RoutedMoE.__call__"} <= set(PUBLIC)
    assert WITHOUT_SOURCE <= set(PUBLIC)
    assert raised(bx.updated_bias, set()) == {"TypeError", "ValueError"}  # by a helper's code
    assert raised(bx.load_entropy, set()) == {"TypeError", "ValueError"}
    assert raised(bx.hash_tables.round_robin, set()) >= {"ValueError"}
    load = annotations("max_violation")["load"]
    assert shapes(load) == shapes(load | None) == {"(*layers, experts)"}
    assert sentences("One two.\n\n    >>> code\nThree: four.") == ["One two.", "Three:", "four."]
