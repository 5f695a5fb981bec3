"""What the docstring of every public name must say, as far as a program can check it.

- An example, run as a doctest, that uses the name.
- The name of every argument or field, in backticks.
- The shape of every annotated array: `Float[Array, "*layers experts"]` is `(*layers, experts)`.
- Every kind of exception that the code raises, under **Raises:**.
- The published equation, format or reference file that it implements, under **Source:**.

A docstring may refer to another: "as for `X`" or "as `X` does" takes over what `X` says.
"""

import ast
import dataclasses
import doctest
import functools
import inspect
import re
import textwrap
import types
import typing

import pytest
from jaxtyping import AbstractArray

import braidax as bx

# Compositions of the others, without an equation or a format of their own.
WITHOUT_SOURCE = {
    "AbstractExperts",
    "AbstractRouter",
    "MoEConfig.tiny",
    "RoutedMoE.from_config",
    "RoutedAndSharedMoE.from_config",
    "Routing",
    "dead_experts",
    "decay_mask",
    "expert_load",
    "hash_tables.from_array",
    "is_hash_layer",
    "load_entropy",
    "plan",
    "trainable",
}
# The parts of braidax that only draw and print.
LOOKING = "braidax._inspect"
INTERNAL = {"routed_sum"}  # what a block calls; public only to the block's file


def is_public_member(name, value):
    """A method, class method or property written in this library."""
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    written = isinstance(value, types.FunctionType | property | functools._lru_cache_wrapper)
    return written and name not in INTERNAL and (name == "__call__" or not name.startswith("_"))


def public_names():
    """`{dotted name: object}` of everything that a user is told about."""
    found = {}
    modules = {}
    for name, value in vars(bx).items():
        if name.startswith("_") or name == "jaxtyping":  # added by the import hook
            continue
        (modules if inspect.ismodule(value) else found)[name] = value
    for prefix, module in modules.items():
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                if value.__module__ == module.__name__:
                    found[f"{prefix}.{name}"] = value
    for owner, value in list(found.items()):
        if inspect.isclass(value):
            for name, member in vars(value).items():
                if is_public_member(name, member):
                    found[f"{owner}.{name}"] = inspect.getattr_static(value, name)
    return found


PUBLIC = public_names()


def unwrapped(value):
    if isinstance(value, property):
        value = value.fget
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return inspect.unwrap(value) if callable(value) else value


def own_documentation(name):
    """The docstring, and for a class those of its construction and of its fields' owner."""
    value = PUBLIC[name]
    text = inspect.getdoc(unwrapped(value)) or ""
    if inspect.isclass(value):
        # A dataclass without a docstring is given its signature for one.
        text = "" if text.startswith(f"{value.__name__}(") else text
        construction = inspect.getdoc(value.__init__) or ""
        if not construction.startswith("Initialize self."):  # what Python says of any class
            text += "\n\n" + construction
    return text


@functools.cache
def documentation(name):
    """What a reader of `name` is told, references to other names followed."""
    text = own_documentation(name)
    for other in re.findall(r"\b[Aa]s\s(?:for\s|in\s)?`([\w.]+)`", text):
        siblings = (other, f"{name.rsplit('.', 1)[0]}.{other}")
        siblings += (f"hash_tables.{other}", f"{name.split('.')[0]}.{other}")
        text += "".join("\n\n" + documentation(full) for full in siblings if full in PUBLIC)
    if name.endswith(".__call__"):
        text += "\n\n" + own_documentation(name.rsplit(".", 1)[0])
    return text


def annotations(name):
    """`{argument or field: annotation}`, and the annotation of what is returned as `return`."""
    value = PUBLIC[name]
    if inspect.isclass(value):
        fields = {}
        if dataclasses.is_dataclass(value):
            fields = {field.name: field.type for field in dataclasses.fields(value)}
        signature = inspect.signature(value.__init__)
        arguments = {p.name: p.annotation for p in signature.parameters.values()}
        found = {**fields, **arguments}
    else:
        signature = inspect.signature(unwrapped(value))
        found = {p.name: p.annotation for p in signature.parameters.values()}
        found["return"] = signature.return_annotation
    return {key: kind for key, kind in found.items() if key not in ("self", "cls")}


def shapes(name):
    """Of every annotated array but random keys, whose shape depends on how they were made."""
    kinds = {key: kind for key, kind in annotations(name).items() if key != "key"}
    return {shape for kind in kinds.values() for shape in array_shapes(kind)}


def array_shapes(annotation):
    """`(*layers, experts)` for every array with axes in an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        axes = annotation.dim_str.split()
        shape = f"({axes[0]},)" if len(axes) == 1 else f"({', '.join(axes)})"
        return {shape} if axes and "..." not in axes else set()
    return {shape for part in typing.get_args(annotation) for shape in array_shapes(part)}


def raised(function, seen=None):
    """Names of the exceptions raised by a function and by those of this library that it calls by
    name, in its body and below."""
    seen = set() if seen is None else seen
    function = unwrapped(function)
    if inspect.isclass(function):
        methods = ("__init__", "__post_init__")
        return {e for m in methods if m in vars(function) for e in raised(vars(function)[m], seen)}
    code = getattr(function, "__code__", None)
    ours = getattr(function, "__module__", "") or ""
    if code is None or code in seen or not ours.startswith("braidax"):
        return set()
    seen.add(code)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # generated, as the __init__ of a dataclass
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call | ast.Name):
            named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            kind = getattr(named, "id", None)
            if kind and kind.endswith("Error"):
                found.add(kind)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= raised(function.__globals__.get(node.func.id), seen)
    return found


def examples(name):
    """The doctests of a name; for a member, those of its class as well."""
    owner = [name.rsplit(".", 1)[0]] if name.rsplit(".", 1)[0] in PUBLIC else []
    texts = [own_documentation(each) for each in (name, *owner)]
    parser = doctest.DocTestParser()
    return [example.source for text in texts for example in parser.get_examples(text)]


def is_used(name, sources):
    """Whether the examples call or read what `name` is."""
    short = name.rsplit(".", 1)[-1]
    if short == "__call__":
        return bool(sources)
    return any(re.search(rf"\b{short}\b", source) for source in sources)


def inherited(name):
    """An overriding member, which a user reads about where it is first declared."""
    owner, _, short = name.rpartition(".")
    bases = PUBLIC[owner].__mro__[1:] if inspect.isclass(PUBLIC.get(owner)) else ()
    return any(short in vars(base) for base in bases)


def members_that_users_call(name):
    """All but what only a subclass of a router or of experts has to write."""
    owner = name.rpartition(".")[0]
    return not (owner in ("AbstractRouter", "AbstractExperts") or inherited(name))


every_name = pytest.mark.parametrize("name", sorted(PUBLIC))


def test_the_public_names_are_found():
    assert {"Routing", "hash_tables.md5", "MoEConfig.from_hf", "ExpertParallel.shard"} <= set(
        PUBLIC
    )
    assert {"AbstractRouter.select", "RoutedMoE.__call__", "ExpertParallel.size"} <= set(PUBLIC)
    assert WITHOUT_SOURCE <= set(PUBLIC)
    assert not any(name.split(".")[-1] in INTERNAL for name in PUBLIC)


def test_what_a_docstring_must_tell_is_read_from_the_code():
    assert raised(bx.updated_bias) == {"TypeError", "ValueError"}  # by the helper that it calls
    assert raised(bx.SwiGLU) == {"TypeError", "ValueError"}
    assert raised(bx.expert_load) == set()
    load = inspect.signature(bx.max_violation).parameters["load"].annotation
    assert array_shapes(load) == {"(*layers, experts)"}
    assert array_shapes(load | None) == {"(*layers, experts)"}
    assert shapes("expert_load") == {"(experts,)"}


@every_name
def test_it_has_a_docstring(name):
    assert own_documentation(name).strip()


@every_name
def test_it_has_an_example_that_uses_it(name):
    if members_that_users_call(name):
        assert is_used(name, examples(name)), f"no doctest uses {name}"


@every_name
def test_every_argument_is_named(name):
    text = documentation(name)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", text))))
    wanted = set(annotations(name)) - {"return", "grouped_matmul"}
    if inspect.isclass(PUBLIC[name]) and "all others: the arguments of the constructor" in text:
        wanted &= set(inspect.signature(PUBLIC[name].__init__).parameters)
    assert wanted - named == set(), f"{name} does not explain these"


@every_name
def test_every_shape_is_told(name):
    text = documentation(name)
    assert {shape for shape in shapes(name) if shape not in text} == set()


@every_name
def test_every_exception_is_told(name):
    text = documentation(name)
    wanted = raised(PUBLIC[name])
    if wanted:
        assert "**Raises:**" in text
    assert {kind for kind in wanted if kind not in text} == set()


def has_a_source(name):
    drawn = unwrapped(PUBLIC[name]).__module__.startswith(LOOKING)
    return not drawn and WITHOUT_SOURCE.isdisjoint({name, name.rpartition(".")[0]})


@pytest.mark.parametrize("name", sorted(filter(has_a_source, PUBLIC)))
def test_its_source_is_told(name):
    value, owner = unwrapped(PUBLIC[name]), name.rpartition(".")[0]
    text = documentation(name) + (documentation(owner) if owner in PUBLIC else "")
    module = inspect.getmodule(value)
    assert "**Source:**" in text or "arXiv" in (module.__doc__ or "")


@every_name
def test_markdown_does_not_eat_it(name):
    """Prompts outside of an indented block would be rendered as nested quotations, and a list that
    follows a paragraph without an empty line as a part of it."""
    lines = own_documentation(name).splitlines()
    assert [line for line in lines if line.startswith(">>>")] == []
    pairs = zip(lines, lines[1:], strict=False)
    assert [
        after for before, after in pairs if re.match(r"- ", after) and re.match(r"[\w*`]", before)
    ] == []
