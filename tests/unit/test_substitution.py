"""Substitution: candidates ranked as by hand, known ones left out, elements in their groups."""

import csv
import itertools
import json

import numpy as np
import pytest
from silent import Silent
from typer.testing import CliRunner

from dmi_hpc.cli.data import app as data_app
from dmi_hpc.cli.rank import app
from dmi_hpc.config import Recipe, TrainConfig
from dmi_hpc.errors import DataError
from dmi_hpc.job import Job
from dmi_hpc.models.spec import shapes
from dmi_hpc.problem import Problem
from dmi_hpc.run import open_run
from dmi_hpc.substitution import elements
from dmi_hpc.substitution.held_out import Learnt, SiteTable, held_out
from dmi_hpc.substitution.systems import candidates
from dmi_hpc.substitution.templates import (
    Known,
    Template,
    assignment_scores,
    best,
    rank_of,
    without,
)
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.sites import SYMBOLS
from dmi_hpc.train import fit

TASK = {"name": "dmi_hpc.tasks.sites:Sites"}
SPINEL = Template("spinel", np.array([0, 1, 2, 2]), np.array([2, 4, 4, 4]))


def random_probabilities(sites, elements=6, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(elements), sites)


def test_scores_are_sums_over_sites_of_different_elements():
    p = random_probabilities(4)
    scores = assignment_scores(SPINEL, p)
    assert scores.shape == (6, 6, 6)
    assert np.isfinite(scores).sum() == 6 * 5 * 4
    for a, b, c in itertools.product(range(6), repeat=3):
        expected = np.log(p[0, a] * p[1, b] * p[2, c] * p[3, c])
        assert scores[a, b, c] == pytest.approx(expected if len({a, b, c}) == 3 else -np.inf)


def test_ranks_and_the_best_agree_with_sorting():
    scores = assignment_scores(SPINEL, random_probabilities(4))
    everything = best(scores, 1000)
    assert len(everything) == 120
    assert [rank_of(scores, found) for found, _ in everything] == list(range(1, 121))
    assert best(scores, 7) == everything[:7]
    values = [score for _, score in everything]
    assert values == sorted(values, reverse=True)


def test_equal_scores_stand_before_the_truth():
    pair = Template("salt", np.array([0, 1]), np.array([4, 4]))
    assert rank_of(assignment_scores(pair, np.full((2, 5), 0.2)), (0, 1)) == 20
    assert rank_of(assignment_scores(pair, np.array([[1.0, 0, 0], [0, 1, 0]])), (0, 1)) == 1


def test_known_compounds_are_left_out_by_their_amounts():
    assert SPINEL.amounts == (1, 2, 4)
    known = Known(
        [
            frozenset({(0, 1), (3, 2), (5, 4)}),  # a spinel
            frozenset({(5, 1), (4, 1), (3, 2)}),  # of other amounts
            frozenset({(2, 1), (1, 2)}),
        ]
    )
    assert known.assignments(SPINEL).tolist() == [[0, 3, 5]]
    perovskite = Template("p", np.array([0, 1, 2]), np.array([1, 1, 2]))
    assert sorted(known.assignments(perovskite).tolist()) == [[4, 5, 3], [5, 4, 3]]
    scores = assignment_scores(perovskite, random_probabilities(3))
    assert np.isfinite(without(scores, known.assignments(perovskite))).sum() == 118
    assert np.isfinite(scores).sum() == 120  # unchanged


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], [0, 2], []])
def test_a_template_of_other_groups_is_refused(groups):
    with pytest.raises(DataError, match="different elements, expected 1 to 3"):
        Template("x", np.array(groups, dtype=int), np.ones(len(groups), dtype=int))


def table_of(*structures):
    """(name, type, [(element, atoms), ...]) each."""
    rows = [
        (name.encode(), kind.encode(), e, n) for name, kind, sites in structures for e, n in sites
    ]
    return SiteTable(*map(np.array, zip(*rows, strict=True)))


TRAIN = table_of(
    ("a", "salt", [(10, 4), (16, 4)]),
    ("b", "salt", [(11, 4), (7, 4)]),
    ("c", "fluorite", [(19, 4), (8, 8)]),
)
TEST = table_of(("x", "salt", [(19, 4), (7, 4)]), ("y", "new", [(10, 2), (8, 2)]))


def test_held_out_compounds_are_ranked_among_the_elements_of_the_training():
    p = np.full((4, 118), 1e-3)
    p[[0, 1, 2, 3], [19, 7, 10, 8]] = [0.9, 0.9, 0.9, 0.2]
    p[3, 16] = 0.5  # NaCl instead of NaF, but it is known
    x, y = held_out(TEST, p, Learnt.of(TRAIN), count=3)
    # the sites of x are sorted by element: group 0 is O
    assert (x.structure, x.elements, x.seen, x.rank, x.rank_new) == ("x", (7, 19), True, 1, 1)
    assert (y.structure, y.elements, y.seen, y.rank, y.rank_new) == ("y", (8, 10), False, 2, 1)
    assert x.candidates == 6 * 5
    assert y.first[0][0] == (8, 10)
    assert x.by_frequency == 30  # no element is more frequent than another: all are equal
    assert x.by_type < 30


def test_compounds_of_the_training_rows_are_told():
    learnt = Learnt.of(TRAIN)
    table = table_of(("a2", "new", [(10, 2), (16, 2)]), ("a3", "new", [(10, 2), (16, 4)]))
    again, other = held_out(table, np.full((4, 118), 1 / 118), learnt, 1)
    assert again.known and not other.known


def test_an_element_the_training_never_saw_is_last():
    table = table_of(("z", "salt", [(10, 4), (91, 4)]))
    (found,) = held_out(table, np.full((2, 118), 1 / 118), Learnt.of(TRAIN), 1)
    assert found.rank == found.rank_new == found.by_type == found.by_frequency == 31


def test_frequencies_in_the_structure_type_know_the_roles():
    fluorites = [(f"s{i}", "f", [(19, 4), (8, 8)]) for i in range(50)]
    learnt = Learnt.of(table_of(*fluorites, ("o", "salt", [(10, 4), (16, 4)])))
    fluorite = Template("t", np.array([0, 1]), np.array([8, 4]))
    shares = learnt.by_type("f", fluorite)
    assert shares.sum(axis=1) == pytest.approx([1, 1])
    assert learnt.elements[shares.argmax(axis=1)].tolist() == [8, 19]


def test_confusion_counts_groups_and_chance():
    group, row = elements.table_places(SYMBOLS)
    at = {s: i for i, s in enumerate(SYMBOLS)}
    truth = np.array([at[s] for s in ("Na", "K", "Cl", "Br", "O", "O")])
    given = np.array([at[s] for s in ("K", "Na", "Br", "Cl", "O", "Na")])
    found = elements.confusion(truth, given, group, row)
    assert (found.errors, found.group) == (5, 0.8)
    assert 0 < found.group_chance < 0.4
    assert found.row == 0
    assert elements.macro_error(truth, given) == pytest.approx(np.mean([1, 1, 1, 1, 0.5]))


def test_neighbours_of_weights_and_their_chance():
    weights = np.array([[1.0, 0], [5, 0.1], [0, 1], [0.1, 2]])
    assert elements.nearest(weights).tolist() == [1, 0, 3, 2]
    assert elements.chance_of_neighbours(np.array([1, 1, 17, 17])) == pytest.approx(1 / 3)


def test_candidates_of_a_system_are_the_best_of_each_type():
    p = np.full((6, 118), 1e-3)
    p[[0, 1], [10, 16]] = 0.9  # structure a would rather be NaCl
    p[[2, 3], [16, 10]] = 0.5  # b, less surely, the other way round: the same compound
    found = candidates(TRAIN, p, np.array([7, 8, 10, 11, 16, 19]), (10, 16))
    salts = [c for c in found if c.type == "salt"]
    assert len(salts) == 1 and salts[0].compound == frozenset({(10, 1), (16, 1)})
    assert (salts[0].template, salts[0].rank) == ("a", 1)
    assert {c.compound for c in found if c.type == "fluorite"} == {
        frozenset({(10, 1), (16, 2)}),
        frozenset({(10, 2), (16, 1)}),
    }
    assert all(c.share <= 0 for c in found)


def sites_task(**options):
    return make_task({**TASK, **options})


def test_the_network_reads_pictures_and_knows_118_elements():
    task = sites_task(filters=(8, 16), units=(32,))
    network = task.published_network()
    assert shapes(network)[-1] == (32,) and network.outputs == 118 == len(set(SYMBOLS))
    made = task.network_inputs({"fingerprint": np.full((2, 12, 16, 16), 51, dtype=np.uint8)})
    assert made.dtype == np.float32 and made.max() == pytest.approx(0.2)
    assert shapes(task.space().founders[0].network)


def test_baselines_give_probabilities():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (30, 12, 16, 16)).astype(np.uint8)
    target = rng.integers(0, 3, 30)
    fields = {"fingerprint": pictures}
    for baseline in sites_task(neighbours=3).baselines():
        found = baseline.predict(fields, target, fields)
        assert found.sum(axis=1) == pytest.approx(np.ones(30)), baseline.name
    assert found.argmax(axis=1).tolist() == target.tolist()  # each is nearest to itself


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small network of pairs of 8 metals and 8 others, 5 structures each; a pixel is the element."""
    folder = tmp_path_factory.mktemp("sites")
    rng = np.random.default_rng(0)
    metals, others = [2, 3, 10, 11, 18, 19, 36, 37], [7, 8, 15, 16, 33, 34, 51, 52]
    pairs = [(m, o) for m in metals for o in others]
    element = np.repeat(pairs, 5, axis=0).ravel()
    pictures = np.zeros((len(element), 12, 16, 16))
    pictures[np.arange(len(element)), element % 12, element % 16] = 200
    pictures += rng.uniform(0, 20, pictures.shape)
    split = rng.choice(["train", "validation", "test"], len(pairs), p=[0.6, 0.2, 0.2]).repeat(5)
    np.savez(
        folder / "sites.npz",
        fingerprint=pictures.astype(np.uint8),
        element=element.astype(np.uint8),
        atoms=np.tile([1, 2], 5 * len(pairs)).astype(np.uint16),
        structure=np.repeat([f"s{i:03d}" for i in range(5 * len(pairs))], 2),
        template=np.repeat(["1:a.b"], 10 * len(pairs)),
        splits=np.repeat(split, 2),
    )
    fields = [f"--field={n}" for n in ("fingerprint", "element", "atoms", "structure", "template")]
    given = [str(folder / "sites.npz"), f"--out={folder / 'data'}", "--split-column=splits"]
    done = CliRunner().invoke(data_app, ["import", *given, *fields, "--processes=1"])
    assert done.exit_code == 0, done.output
    recipe = Recipe.model_validate(
        {
            "name": "sites",
            "task": {**TASK, "filters": (16,), "units": (32,)},
            "data": {"path": folder / "data"},
        }
    )
    made = open_run(folder / "run", recipe)
    problem = Problem.open(make_task(recipe.task), made.data)
    config = TrainConfig(epochs=6, batch_size=16, learning_rate=1e-2, threads=1)
    network = problem.task.published_network()
    job = Job(problem, network, config, seed=0, checkpoints=made.checkpoints)
    fit(job, Silent(), resume=False, warn=print)
    return made


def test_rank_writes_what_it_says(run):
    result = CliRunner().invoke(app, [str(run.folder)])
    assert result.exit_code == 0, result.output
    found = json.loads((run.folder / "ranking.json").read_text())
    compounds = found["compounds"]["all"]
    with (run.folder / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == compounds["compounds"] == found["compounds"]["2 elements"]["compounds"]
    assert compounds["rank"]["top_10"] == np.mean([int(row["rank"]) <= 10 for row in rows])
    assert all(int(row["candidates"]) == 16 * 15 for row in rows)
    # each picture tells its element
    assert found["sites"]["accuracy"] > 0.8 > found["sites"]["most_frequent"]
    assert compounds["rank"]["first"] > 0.5 > compounds["by_frequency"]["first"]
    assert compounds["rank_new"]["first"] >= compounds["rank"]["first"]
    with (run.folder / "elements.csv").open() as file:
        assert len(list(csv.DictReader(file))) == found["elements"]["elements"] > 10
    assert (run.folder / "elements.png").read_bytes()[:4] == b"\x89PNG"
    right = next(row for row in rows if row["rank_new"] == "1")
    assert right["first_new"].split()[0] == right["formula"]
    assert f"{compounds['rank']['top_10']:.4f}" in result.output


def test_candidates_of_a_system_say_what_is_known(run, tmp_path):
    out = tmp_path / "li_o.csv"
    result = CliRunner().invoke(app, [str(run.folder), "--elements", "Li,O", "--out", str(out)])
    assert result.exit_code == 0, result.output
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["formula"] for row in rows} == {"LiO2", "Li2O"}
    assert rows[0]["formula"] == "LiO2"  # metals are the single atoms here
    assert rows[0]["known"] in ("train", "validation", "test") and rows[1]["known"] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--elements", "Li,Xx", "--out", "a.csv"], "Xx: not among the elements"),
        (["--elements", "Li,O"], "belong together"),
        (["--split", "train"], "expected test or validation"),
    ],
)
def test_what_rank_cannot_do_is_said(run, arguments, said):
    result = CliRunner().invoke(app, [str(run.folder), *arguments])
    assert said in str(result.exception)
