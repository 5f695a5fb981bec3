"""Every Python block of the documentation runs, and every public name has its place in it."""

import ast
import inspect
import json
import pathlib
import re
import types

import jax
import pytest
from pages import blocks, run_page

import braidax as bx
from braidax import training

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
# tests/parallel/test_extending.py runs that page, and then its classes.
ELSEWHERE = DOCS / "guide" / "extending.md"
PAGES = sorted(path for path in DOCS.rglob("*.md") if blocks(path.read_text(encoding="utf-8")))
PAGES.remove(ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path)


def test_the_readme_opens_released_weights_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "DeepSeek-V4-Flash"
    folder.mkdir()
    config = bx.MoEConfig(64, 32, 8, 2)
    layer = bx.RoutedAndSharedMoE.from_config(config, 3, key=jax.random.key(0))
    bx.save_moe(folder / "layer-3.safetensors", layer, 3, quantization="fp4")
    keys = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    released = {**dict(zip(keys, (64, 32, 8, 2), strict=True)), "model_type": "deepseek_v4"}
    (folder / "config.json").write_text(json.dumps(released))
    names = {"bx": bx, "hidden_states": jax.numpy.ones((4, 64)), "input_ids": None}
    (source,) = [source for _, source in blocks(README) if source.startswith("layer = bx.load_moe")]
    exec(source, names)
    assert names["output"].shape == (4, 64)
    assert (tmp_path / "layer.safetensors").exists()


def test_the_diff_of_a_family_is_what_is_there():
    """A whole file, and lines of others; no other file of the library knows the family."""
    page = (DOCS / "guide" / "families.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    parts = re.findall(r"^--- (\S+)\n\+\+\+ (\S+)\n((?:\+.*\n)+)", diff, re.MULTILINE)
    assert sum(2 + added.count("\n") for _, _, added in parts) == diff.count("\n")
    for before, after, added in parts:
        lines = [line.removeprefix("+") for line in added.splitlines()]
        there = (ROOT / after).read_text(encoding="utf-8").splitlines()
        assert lines == there if before == "/dev/null" else set(lines) <= set(there)
    (own, *_), shared = [after for _, after, _ in parts], {after for _, after, _ in parts}
    name = pathlib.Path(own).stem
    others = [path for path in (ROOT / "src").rglob("*.py") if name in path.read_text("utf-8")]
    assert {path.relative_to(ROOT).as_posix() for path in others} <= shared


def test_every_feature_of_the_comparison_has_its_test():
    """Each row of which braidax does not say "no" names a test that its file has."""
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    tables, tests = page.split("\n## Tests\n")
    rows = re.findall(r"^\| (.+?) \| (.+?) \|.*\|$", tables, re.MULTILINE)
    claimed = {feature for feature, ours in rows if not re.match(r"(no|\[no\].*)$", ours)}
    named = re.findall(r"^\| (.+) \| `(.+\.py)` \| `(test_\w+)` \|$", tests, re.MULTILINE)
    assert len(named) == tests.count("\n| ") - 1 > 20
    assert {feature for feature, *_ in named} == claimed - {"feature"}
    for _, file, test in named:
        code = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in code.body if isinstance(node, ast.FunctionDef)}, test


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_every_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def public_names(module):
    """What a user reads in a module: its definitions, and what it imports as itself."""
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return {name: getattr(module, name) for name in names if not name.startswith("_")}


def public_paths():
    """`braidax.Gate`, `braidax.matmul.Auto`. Where a module is called like the function in it, the
    short path would show the module."""
    for name, value in {**public_names(bx), "training": training}.items():
        if isinstance(value, types.ModuleType):
            yield f"braidax.{name}"
            yield from (f"braidax.{name}.{part}" for part in public_names(value))
        else:
            module = value.__module__
            yield f"{module if module.split('.')[-1] == name else 'braidax'}.{name}"


def test_every_public_name_is_on_an_api_page():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (braidax[\w.]+)$", pages, re.MULTILINE))
    wanted = set(public_paths())
    # A module that is shown as a whole shows its names, and one whose names are shown is shown.
    whole = {name for name in shown if isinstance(getattr(bx, name[8:], None), types.ModuleType)}
    parts = {name.rpartition(".")[0] for name in shown}
    missing = {n for n in wanted - shown - parts if n.rpartition(".")[0] not in whole}
    assert missing == set()
    assert {name for name in shown - wanted if "._" not in name} == set()


def test_the_navigation_lists_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    listed = set(re.findall(r"[\w/]+\.md", navigation.split("\nhooks:")[0]))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
