"""The report: complete, self-contained, escaped, reproducible, and honest about what is absent."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import pytest

from dmi_hpc.errors import RunError
from dmi_hpc.report import write_report
from dmi_hpc.report.collect import read_run
from dmi_hpc.report.formatting import number
from dmi_hpc.report.journals import read_search
from dmi_hpc.report.page import headline

SECTIONS = {
    "result",
    "gallery",
    "network",
    "training",
    "search",
    "genealogy",
    "data",
    "reproduce",
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


def _fixture() -> ModuleType:
    path = Path(__file__).with_name("report_fixture.py")
    spec = importlib.util.spec_from_file_location("report_fixture", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _fixture()


class Page(HTMLParser):
    """Checks nesting and collects ids, references and the values of a table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.sections: set[str] = set()
        self.references: list[str] = []
        self.values: list[float] = []
        self.unlabelled: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "section":
            self.sections.add(found["id"])
        if tag == "data":
            self.values.append(float(found["value"]))
        names = ("src", "href", "xlink:href")
        self.references += [found[name] for name in names if name in found]
        if (tag == "svg" and not found.get("aria-label")) or (tag == "img" and not found["alt"]):
            self.unlabelled.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(run: Path) -> Page:
    return Page(write_report(run).read_text("utf-8"))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("complete")
    make.complete_run(run)
    write_report(run)
    return run


@pytest.fixture(scope="module")
def complete_page(complete: Path) -> Page:
    return Page((complete / "report.html").read_text("utf-8"))


def test_complete_run_has_every_section_and_a_table_of_contents(complete_page: Page):
    assert complete_page.sections == SECTIONS
    linked = {r[1:] for r in complete_page.references if r.startswith("#") and len(r) < 20}
    assert linked >= SECTIONS
    assert "Not in this run folder" not in complete_page.text


def test_page_is_self_contained(complete_page: Page):
    """Nothing is fetched: every reference lies in the page or is embedded data."""
    outside = [
        r for r in complete_page.references if not r.startswith(("#", "data:image/png;base64,"))
    ]
    assert outside == []
    assert not complete_page.tags & {"script", "link", "iframe", "object", "base"}
    assert not re.search(r"@import|url\((?!#)", complete_page.text)


def test_page_is_accessible_and_its_references_resolve(complete_page: Page):
    assert complete_page.unlabelled == []
    assert len(complete_page.ids) == len(set(complete_page.ids))
    inner = {r[1:] for r in complete_page.references if r.startswith("#")}
    inner |= set(re.findall(r"url\(#([^)]+)\)", complete_page.text))
    assert inner <= set(complete_page.ids)


def test_chart_colours_follow_the_theme(complete_page: Page):
    for svg in re.findall(r"<svg.*?</svg>", complete_page.text, re.DOTALL):
        hexes = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", svg))
        assert hexes <= {"#ffffff"}, "a colour that dark mode cannot change"


def test_equal_runs_give_equal_bytes(complete: Path, tmp_path: Path):
    make.complete_run(tmp_path)
    first = (complete / "report.html").read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert write_report(tmp_path).read_bytes() == first


def test_figures_ignore_and_keep_the_users_matplotlib_settings(complete: Path):
    before = (complete / "report.html").read_bytes()
    with mpl.rc_context({"font.size": 33, "axes.grid": True, "svg.hashsalt": "theirs"}):
        settings_before = dict(mpl.rcParams)
        assert write_report(complete).read_bytes() == before
        assert dict(mpl.rcParams) == settings_before


def test_table_shows_the_evaluation(complete: Path, complete_page: Page):
    evaluation = json.loads((complete / "evaluation.json").read_text())
    for method in [*evaluation["methods"], *evaluation["published"]]:
        assert method["mae"] in complete_page.values
        assert method["label"] in complete_page.text
    for key in ("mae", "rmse", "r2", "mae_percent"):
        assert all(m[key] in complete_page.values for m in evaluation["methods"])
    assert "not run here" in complete_page.text


def test_headline_states_the_ratios(complete: Path):
    run = read_run(complete)
    assert run.evaluation is not None
    mae = {method.name: method.mae for method in run.evaluation.methods}
    text = headline(run)
    assert f"{number(mae['voigt'] / mae['network'], 2)} times smaller than Rule of mixtures" in text
    assert f"{number(mae['two_point'] / mae['network'], 2)} times smaller than the best" in text


def test_split_that_was_not_held_out_is_not_called_unseen(tmp_path: Path):
    make.write_run(tmp_path)
    evaluation = make.write_evaluation(tmp_path)
    make.write_json(tmp_path / "evaluation.json", {**evaluation, "split": "train"})
    text = page(tmp_path).text
    assert "120 train rows" in text
    assert "unseen" not in text
    assert "no method has seen" not in text


def test_only_the_winner_is_called_evolved(tmp_path: Path):
    make.complete_run(tmp_path)
    assert headline(read_run(tmp_path)).startswith("The evolved network")
    make.write_json(tmp_path / "train" / "network.json", make.ELEMNET)
    assert headline(read_run(tmp_path)).startswith("The network")


def test_epochs_are_shown_from_one(complete_page: Page):
    assert "weights of epoch 55 kept" in complete_page.text  # best_epoch 54


def test_headline_admits_a_loss(tmp_path: Path):
    make.write_run(tmp_path)
    make.write_evaluation(tmp_path, methods={"network": ("Net", 0.2), "forest": ("Forest", 0.1)})
    text = headline(read_run(tmp_path))
    assert "times larger than Forest" in text
    assert "smaller" not in text


def test_everything_from_users_is_escaped(tmp_path: Path):
    evil = '"><script>alert({})</script>&amp; $x_'
    make.write_run(tmp_path, name=evil, task=evil)
    make.write_data(tmp_path)
    best = make.write_search(tmp_path)
    make.write_gallery(tmp_path)
    methods = {"network": (evil, 0.1), evil: (evil, 0.2)}
    make.write_evaluation(tmp_path, methods=methods, quantity=evil, unit=evil, label=evil)
    for name in ("gallery/gallery.json", "data/manifest.json", "run.json", "search/winner.json"):
        path = tmp_path / name
        value = json.loads(path.read_text())
        if name.startswith("gallery"):
            value = [{**entry, "caption": evil} for entry in value]
        elif name.startswith("data"):
            value["plan"]["fields"][0] |= {"name": evil, "description": evil, "unit": evil}
            value["plan"]["provenance"] = {evil: {evil: [evil]}}
        elif name.startswith("run"):
            value |= {"commands": [evil], "versions": {evil: evil}, "hardware": {evil: evil}}
        else:
            value["hyper"] = {evil: evil}
        path.write_text(json.dumps(value))
    journal = tmp_path / "search" / "journal.jsonl"
    origin = json.dumps(evil)
    text = re.sub(r'"origin": "[a-z]+"', lambda _: f'"origin": {origin}', journal.read_text())
    journal.write_text(text.replace('"loss is not finite"', origin))
    made = page(tmp_path)
    assert best >= 0
    assert "script" not in made.tags
    assert "<script" not in made.text
    assert made.sections == SECTIONS - {"training"}


def test_training_only_shows_the_published_network_and_says_what_is_missing(tmp_path: Path):
    make.elemnet_run(tmp_path)
    made = page(tmp_path)
    assert made.sections == {"result", "network", "training", "reproduce"}
    assert "The network that was trained" in made.text
    assert "data (<code>dmi data</code>), search (<code>dmi search</code>)." in made.text
    assert "eV/atom" in made.text
    assert "Dense 1,024" in made.text
    assert len(made.text) < 1_000_000, "3,000 points must become a bitmap"


def test_search_in_which_everything_failed(tmp_path: Path):
    make.write_run(tmp_path)
    assert make.write_search(tmp_path, trials=20, all_fail=True) == -1
    made = page(tmp_path)
    assert made.sections == {"search", "reproduce"}
    assert "all 20 finished ones failed" in made.text
    search = read_search(tmp_path / "search" / "journal.jsonl")
    for kind, count, message in search.failures():
        assert f"{kind}: {count}" in made.text
        assert message in made.text
    assert sum(count for _, count, _ in search.failures()) == 20


def test_running_search_without_a_winner_draws_the_best_so_far(tmp_path: Path):
    make.write_run(tmp_path)
    best = make.write_search(tmp_path)
    (tmp_path / "search" / "winner.json").unlink()
    made = page(tmp_path)
    assert made.sections == {"search", "genealogy", "reproduce"}
    assert f"Ancestors of evaluation {best}:" in made.text


@pytest.mark.parametrize("lines", [[], [{"event": "header", "time": 1.0, "config": {}}]])
def test_empty_search(tmp_path: Path, lines: list):
    make.write_run(tmp_path)
    make.write_lines(tmp_path / "search" / "journal.jsonl", lines)
    assert "no evaluation has been asked for yet" in page(tmp_path).text


def test_nothing_run_yet(tmp_path: Path):
    make.write_run(tmp_path)
    made = page(tmp_path)
    assert made.sections == {"reproduce"}
    assert "Nothing has been run yet" in made.text


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("run.json", '{"name": "x", "task": "y"}', "recipe"),
        ("run.json", "{torn", "JSON"),
        ("evaluation.json", '{"split": "test"}', "rows"),
        ("train/status.json", '{"state": 3}', "state"),
        ("predictions.csv", "row,label\n1,a\n", "truth, network"),
        ("predictions.csv", "row,label,truth,network\n1,a,2.0,nan\n", "line 2, column network"),
        ("gallery/gallery.json", '[{"file": "../../secret.png"}]', "secret.png"),
        ("gallery/gallery.json", '[{"file": "absent.png"}]', "absent.png"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named(tmp_path: Path, file, text, said):
    make.write_run(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(RunError, match=said) as caught:
        write_report(tmp_path)
    assert str(tmp_path / file) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_evaluation_without_the_network_is_refused(tmp_path: Path):
    make.write_run(tmp_path)
    make.write_evaluation(tmp_path, methods={"voigt": ("Voigt", 0.1)})
    with pytest.raises(RunError, match="named 'network', found voigt"):
        write_report(tmp_path)


def test_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(RunError, match=r"no run\.json"):
        write_report(tmp_path)


def test_resumed_epoch_counts_once(tmp_path: Path):
    make.write_run(tmp_path)
    losses = [(0, 0.5), (1, 0.4), (1, 0.3), (2, None)]
    lines = [{"kind": "epoch", "epoch": e, "train_loss": loss} for e, loss in losses]
    make.write_lines(tmp_path / "train" / "metrics.jsonl", lines)
    training = read_run(tmp_path).training
    assert training is not None
    assert [(e.epoch, e.train_loss) for e in training.epochs] == [(0, 0.5), (1, 0.3), (2, None)]
    assert "3 epochs" in page(tmp_path).text


def test_data_set_elsewhere_is_found_by_the_recipe(tmp_path: Path):
    make.write_run(tmp_path / "run")
    make.write_data(tmp_path / "else")
    path = tmp_path / "run" / "run.json"
    info = json.loads(path.read_text())
    info["recipe"]["data"]["path"] = str(tmp_path / "else" / "data")
    path.write_text(json.dumps(info))
    data = read_run(tmp_path / "run").data
    assert data is not None and data.rows == 800


def test_predictions_keep_their_order(complete: Path):
    predictions = read_run(complete).predictions
    assert predictions is not None
    with (complete / "predictions.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert predictions.truth == tuple(float(line["truth"]) for line in lines)
    assert list(predictions.methods) == list(make.HOMOGENIZATION_METHODS)
