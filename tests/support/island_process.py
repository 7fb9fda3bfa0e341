"""An island as a process of its own, without Ray: `python island_process.py RECIPE RUN NAME`.

Its evaluations take no time but a nap; their fitness is a function of the network alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dmi_hpc.config import load_recipe
from dmi_hpc.files import exclusive
from dmi_hpc.tasks import make_task
from search.driver import Driver, Start
from search.evolution.evolve import Success
from search.records import islands
from search.records.history import home
from search.trials.trial import TrialOutcome

NAP_S = 0.02


def fitness(identity: str) -> float:
    return int(identity[:8], 16) / 16**8


def main(recipe_file: str, folder: str, name: str) -> None:
    islands.POLL_S, islands.POLL_SHARE = 0.05, 1.0  # all their time, if they want
    recipe, search = load_recipe(Path(recipe_file)), Path(folder)
    with exclusive(home(search, name), "search"):
        driver = Driver(recipe, make_task(recipe.task).space(), search, start=Start(island=name))
        driver.start(1, 1.0)
        while (proposal := driver.next_proposal()) is not None:
            time.sleep(NAP_S)
            outcome = TrialOutcome(Success(fitness(proposal.hash)), NAP_S, {})
            driver.finished(proposal.id, outcome)
        driver.end("finished")
        driver.write_winner()


if __name__ == "__main__":
    main(*sys.argv[1:])
