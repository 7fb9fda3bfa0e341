"""The documentation holds: examples run, commands parse, links resolve, lists are complete."""

import ast
import importlib
import itertools
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import typer
from pydantic_core import PydanticUndefined
from runner import dmi

from dmi_hpc import knobs
from dmi_hpc.assess import assess
from dmi_hpc.cli import COMMANDS
from dmi_hpc.config import (
    DataConfig,
    LaunchConfig,
    ModelConfig,
    Recipe,
    SearchConfig,
    SpaceConfig,
    StartConfig,
    TrainConfig,
    load_recipe,
)
from dmi_hpc.errors import FailureKind
from dmi_hpc.files import write_text
from dmi_hpc.models.spec import LAYERS
from dmi_hpc.report import write_report
from dmi_hpc.run import open_run
from dmi_hpc.tasks import TASKS, make_task, task_class
from search.evolution.evolve import Evolution, EvolutionConfig, Success
from search.setting import founder_defaults
from search.spaces.genome import to_json
from search.spaces.networks import Networks
from search.trials.trial import Evaluator

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "recipes").glob("*.md"), *(ROOT / "docs").rglob("*.md")]
)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLES = {
    "[data]": DataConfig,
    "[model]": ModelConfig,
    "[train]": TrainConfig,
    "[train.start]": StartConfig,
    "[search]": SearchConfig,
    "[search.space]": SpaceConfig,
    "[launch]": LaunchConfig,
}


class Block(NamedTuple):
    """A fenced block: what stands behind the backticks, and its lines."""

    page: Path
    info: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(page, *match) for match in FENCE.findall(page.read_text())]


ALL = [block for page in PAGES for block in blocks(page)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def marked(word: str) -> list[Block]:
    found = [block for block in ALL if word in block.info.split()]
    assert found, f"no block is marked '{word}'"
    return found


# examples


@pytest.mark.parametrize("block", marked("run"), ids=lambda b: name_of(b.page))
def test_examples_run(block: Block) -> None:
    exec(compile(block.text, name_of(block.page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", marked("recipe"), ids=lambda b: name_of(b.page))
def test_recipe_examples_are_recipes(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "example.toml"
    path.write_text(block.text)
    make_task(load_recipe(path).task)


def test_python_examples_are_python() -> None:
    for block in ALL:
        if block.info.startswith("python"):
            ast.parse(block.text, name_of(block.page))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files of docs/extending.md, as a reader would make them."""
    folder = tmp_path_factory.mktemp("extending")
    for block in blocks(ROOT / "docs" / "extending.md"):
        for word in block.info.split():
            if word.startswith("file="):
                write_text(folder / word.removeprefix("file="), block.text)
    return folder


@pytest.mark.slow
def test_the_task_of_the_extending_page_goes_from_nothing_to_a_report(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and training by real processes; what follows in this one, to save their start."""
    dmi("data", "build", "springs.toml", cwd=example, PYTHONPATH=str(example))
    dmi("train", "springs.toml", cwd=example, PYTHONPATH=str(example))
    monkeypatch.syspath_prepend(str(example))
    run = open_run(example / "runs" / "springs")
    network, baseline = (method["mae"] for method in assess(run, "test")["methods"])
    assert network < 0.5 * baseline
    assert write_report(run.folder).stat().st_size > 10_000


def test_the_task_of_the_extending_page_can_be_searched(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the search does it, without Ray; after the data set of the test above, or its own."""
    monkeypatch.syspath_prepend(str(example))
    recipe, data = load_recipe(example / "springs.toml"), example / "runs" / "springs" / "data"
    if not data.exists():
        dmi("data", "build", "springs.toml", cwd=example, PYTHONPATH=str(example))
    space = make_task(recipe.task).space()
    defaults = founder_defaults(space, recipe.train)
    evolution = Evolution(Networks(space, defaults), EvolutionConfig(seed=recipe.seed, initial=4))
    evaluate = Evaluator(recipe, data, torch.device("cpu"), memory_GB=1.0)
    threads = torch.get_num_threads()
    try:
        for _ in range(recipe.search.evaluations):
            proposal = evolution.ask()
            outcome = evaluate(to_json(proposal.genome)).told
            assert isinstance(outcome, Success), outcome
            evolution.tell(proposal.id, outcome)
    finally:
        torch.set_num_threads(threads)


def test_the_example_keeps_its_promises(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(example))
    springs = importlib.import_module("springs")
    task = make_task({"name": "springs:Springs", "links": 4})
    rows = springs.Rows(task.options, 1)
    parts = [rows(np.array([i])) for i in range(5)]
    together = rows(np.arange(5))
    for name, values in together.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
    inputs = task.inputs(together)
    turned = task.augment(inputs, np.ones(5, dtype=np.uint64))
    np.testing.assert_array_equal(turned, inputs[:, ::-1])
    assert inputs.dtype == turned.dtype == np.float32


# commands


def written_commands() -> Iterator[tuple[str, list[str], bool]]:
    """(where, words after dmi, whether it is a whole command) of all pages and recipes."""
    for block in ALL:
        if block.info not in ("sh", "toml recipe"):
            continue
        for line in block.text.splitlines():
            yield from _in_line(name_of(block.page), line, whole=True)
    for page in PAGES:
        for code in re.findall(r"`(dmi [^`\n]+)`", FENCE.sub("", page.read_text())):
            yield from _in_line(name_of(page), code, whole=False)
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        for line in path.read_text().splitlines():
            if line.startswith("#"):
                yield from _in_line(name_of(path), line.strip("# "), whole=True)


def _in_line(where: str, line: str, *, whole: bool) -> Iterator[tuple[str, list[str], bool]]:
    found = re.match(r"(?:(?:mpirun|torchrun|srun) [^#]*?)?dmi (.+)$", line.strip())
    if found:
        text = re.split(r"\s{2,}[(]", found[1])[0]
        yield where, shlex.split(text, comments=True), whole


def command_of(words: list[str]) -> tuple[typing.Any, list[str]]:
    """The click command that `words` name, and its arguments."""
    name, *rest = words
    assert name in COMMANDS, f"no command {name}"
    command = typer.main.get_command(importlib.import_module(COMMANDS[name][0]).app)
    if hasattr(command, "commands"):
        assert rest, f"dmi {name} needs a sub-command"
        if name in ("search", "launch") and rest[0] not in command.commands:  # of a recipe: run
            rest = ["run", *rest]
        assert rest[0] in command.commands, f"no command {name} {rest[0]}"
        return command.commands[rest[0]], rest[1:]
    return command, rest


def test_written_commands_parse() -> None:
    seen = 0
    for where, words, whole in written_commands():
        shown = f"{where}: dmi {' '.join(words)}"
        if words[0].startswith("-"):
            assert words in (["--help"], ["--version"]), shown
            continue
        if len(words) == 1 and not whole:
            assert words[0] in COMMANDS, shown
            continue
        command, arguments = command_of(words)
        seen += 1
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        unknown = [w for w in own if w.startswith("-") and w.split("=")[0] not in options]
        assert not unknown, f"{shown}: unknown {unknown}"
        if whole and "--help" not in arguments:
            try:
                command.make_context(shown, list(arguments))
            except Exception as error:
                raise AssertionError(f"{shown}: {error}") from error
    assert seen > 30


def test_recipes_in_commands_exist() -> None:
    for where, words, _ in written_commands():
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), f"{where}: {word}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{name_of(page)}: make {target}"


# links and lists


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_placeholder_is_left(page: Path) -> None:
    assert not re.findall(r"@@\w+@@", page.read_text())


def tree_of_the_readme() -> set[str]:
    [block] = marked("tree")
    folders: list[str] = []
    paths = set()
    for line in block.text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, *comment = line.split()
        assert comment, f"{line}: no comment"
        folders[depth:] = [name]
        paths.add("".join(folders))
    return paths


def test_the_tree_of_the_readme_is_the_tree() -> None:
    shown = tree_of_the_readme()
    absent = sorted(path for path in shown if not (ROOT / path).exists())
    assert not absent, f"in the README, not in the tree: {absent}"
    modules = itertools.chain(*((ROOT / p).rglob("*.py") for p in ("dmi_hpc", "search", "launch")))
    recipes, benchmarks = (ROOT / "recipes").glob("*"), (ROOT / "benchmarks").glob("*.py")
    real = {name_of(p) for p in itertools.chain(modules, recipes, benchmarks) if p.is_file()}
    missing = sorted(p for p in real - shown if not p.endswith("__init__.py"))
    assert not missing, f"in the tree, not in the README: {missing}"


def test_every_recipe_is_in_the_recipes_page() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    for path in (ROOT / "recipes").glob("*.toml"):
        assert f"]({path.name})" in text, path.name


def test_environment_variables_exit_codes_and_failures_are_documented() -> None:
    launching = (ROOT / "docs" / "launching.md").read_text()
    for name in vars(knobs).values():
        if isinstance(name, str) and name.startswith("DMI_"):
            assert f"`{name}`" in launching, name
    for code in (0, 1, 2, 75):
        assert f"\n| {code} |" in launching
    search = (ROOT / "docs" / "search.md").read_text()
    for kind in typing.get_args(FailureKind):
        assert f"`{kind}`" in search, kind


# the configuration page


def sections() -> dict[str, str]:
    text = FENCE.sub("", (ROOT / "docs" / "configuration.md").read_text())
    parts = re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def key_rows(section: str) -> dict[str, tuple[str, str]]:
    """key -> (type, default) of the section's table."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)
    return {key: (kind.strip(), default.strip()) for key, kind, default in rows}


def choices(annotation: typing.Any) -> set[str]:
    """Every text that a Literal within `annotation` allows."""
    if typing.get_origin(annotation) is typing.Literal:
        return {value for value in typing.get_args(annotation) if isinstance(value, str)}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*map(choices, typing.get_args(annotation)))
    return set()


def documented_models() -> dict[str, type]:
    tasks = {f'[task] name = "{name}"': task_class(name).Options for name in TASKS}
    return {"Top level": Recipe, **tasks, **TABLES}


@pytest.mark.parametrize("title", documented_models())
def test_the_configuration_page_is_complete_and_right(title: str) -> None:
    fields = documented_models()[title].model_fields
    if title == "Top level":
        tables = {table.strip("[]") for table in TABLES if "." not in table}
        assert set(fields) == {"name", "seed", "task", *tables}
        fields = {name: fields[name] for name in ("name", "seed")}
    rows = key_rows(sections()[title])
    assert list(rows) == list(fields)
    for key, (kind, default) in rows.items():
        value = fields[key].default
        if value is None or value is PydanticUndefined:
            assert default == "none", key
        else:
            documented = tomllib.loads(f"x = {default.strip('`')}")["x"]
            assert documented == (list(value) if isinstance(value, tuple) else value), key
        for choice in choices(fields[key].annotation):
            assert f'"{choice}"' in kind, f"{key}: {choice}"


def test_every_layer_is_in_the_configuration_page() -> None:
    schema = LAYERS.json_schema()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", sections()["[model]"], re.MULTILINE))
    for definition in schema["$defs"].values():
        keys = definition["properties"]
        described = rows[keys["kind"]["const"]]
        for key, content in keys.items():
            if key == "kind":
                continue
            assert f"`{key}`" in described, key
            for choice in content.get("enum", ()):
                assert str(choice) in described, f"{key}: {choice}"
