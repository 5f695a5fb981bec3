"""Every Python block of the documentation runs, and every public name has its place in it."""

import doctest
import json
import pathlib
import re

import jax
import pytest

import braidax as bx
from braidax import _backends

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text):
    """`(line, source)` of the Python blocks of a page, in order."""
    found = BLOCK.finditer(text)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


PAGES = sorted(path for path in DOCS.rglob("*.md") if blocks(path.read_text(encoding="utf-8")))


def run_block(name, line, source, names):
    """A block with prompts is a doctest; one without is a program."""
    if not source.startswith(">>>"):
        exec(compile("\n" * (line - 1) + source, name, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(source, names, name, name, line - 1)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append, clear_globs=False)
    names.update(test.globs)  # a copy
    assert report == [], "".join(report)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_backends, "BACKENDS", dict(_backends.BACKENDS))  # a page adds one
    names = {"__name__": "docs"}
    with jax.numpy_rank_promotion("allow"):  # as a reader has it
        for line, source in blocks(path.read_text(encoding="utf-8")):
            run_block(str(path), line, source, names)


def readme_block(start):
    (source,) = [source for _, source in blocks(README) if source.startswith(start)]
    return source


def test_the_readme_opens_released_weights_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "DeepSeek-V4-Flash"
    folder.mkdir()
    config = bx.MoEConfig(64, 32, 8, 2)
    layer = bx.RoutedAndSharedMoE.from_config(config, 3, key=jax.random.key(0))
    bx.save_moe(folder / "layer-3.safetensors", layer, 3, quantization="fp4")
    keys = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    released = {**dict(zip(keys, (64, 32, 8, 2), strict=True)), "scoring_func": "sqrtsoftplus"}
    (folder / "config.json").write_text(json.dumps(released))
    names = {"bx": bx, "hidden_states": jax.numpy.ones((4, 64)), "input_ids": None}
    exec(readme_block("layer = bx.load_moe("), names)
    assert names["output"].shape == (4, 64)
    assert (tmp_path / "layer.safetensors").exists()


def test_every_public_name_is_on_an_api_page():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (braidax[\w.]+)$", pages, re.MULTILINE))
    public = {name: vars(bx)[name] for name in vars(bx) if not name.startswith("_")}
    public.pop("jaxtyping", None)  # added by the import hook
    wanted = set()
    for name, value in public.items():
        module = getattr(value, "__module__", "")
        # Where a module is called like the function in it, the short path would show the module.
        wanted.add(f"{module if module.split('.')[-1] == name else 'braidax'}.{name}")
    assert wanted - shown == set()
    assert {path for path in shown - wanted if path.count(".") == 1} == set()


def test_the_navigation_lists_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    listed = set(re.findall(r"[\w/]+\.md", navigation.split("\nhooks:")[0]))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
