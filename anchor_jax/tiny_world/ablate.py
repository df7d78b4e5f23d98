"""Runs an ablation: measures or trains its arms, and writes their table."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anchor_jax import interrupts, io
from anchor_jax.errors import Stopped, UserError
from anchor_jax.evaluation.protocol import Ablation
from anchor_jax.prompts import Script, Segment
from anchor_jax.sampling.config import read_config
from anchor_jax.sampling.resolve import load_weights, make_setup, resolve
from anchor_jax.tiny_world import ablation
from anchor_jax.tiny_world.ablation import AblationTrial
from anchor_jax.training import run

PARTS = {"swaps": ablation.ARMS, "trained": ablation.TRAINED}
"""The arms of each comparison, by name."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of arms.

    Attributes:
      part: "swaps" streams one generator; "trained" tunes one for each arm.
      trial: the streams of an arm.
      config: config of the streams and their weights.
      train: config of an arm's training, as `training.run.read_config` takes it.
        It starts from the weights of `config`.
      folder: folder of numbers and tables.
      tell: function that prints a line.
    """

    part: str
    trial: AblationTrial
    config: Any
    train: Any
    folder: pathlib.Path
    tell: Callable[[str], None]

    def identity(self) -> dict[str, Any]:
        """Returns the fields of the trial that the numbers of one start depend on."""
        one = dataclasses.replace(self.trial, starts=1, batch=1)
        return dataclasses.asdict(one)

    def arms(self, names: Sequence[str]) -> list[str]:
        """Returns the arms to measure: the named ones, or all of the part.

        Raises:
          UserError: An arm is unknown.
        """
        known = PARTS[self.part]
        for name in names:
            if name not in known:
                raise UserError(
                    f"--arms: {name!r} is not an arm of --part={self.part}; choose"
                    f" from {', '.join(known)}"
                )
        return list(names) or list(known)

    def run(self, names: Sequence[str]) -> None:
        """Measures arms, and writes their table; measured arms are read from disk.

        Raises:
          UserError: A config is wrong.
          Stopped: A training stopped on request.
        """
        measure = self._measure_swap if self.part == "swaps" else self._measure_trained
        measured = {
            name: [measure(name, start) for start in range(self.trial.starts)]
            for name in names
        }
        summary = ablation.summarize(measured)
        text = ablation.table(summary)
        self.tell(text)
        result = {"trial": dataclasses.asdict(self.trial), "arms": summary}
        io.write_json(self.folder / f"{self.part}.json", result)
        io.write_text(self.folder / f"{self.part}.md", text + "\n")
        if self.part == "swaps":
            self._probe(result)
        self.tell(f"Wrote {self.folder / self.part}.json and .md")

    def _probe(self, result: Mapping[str, Any]) -> None:
        self.tell("probe: loss of a block with different pasts (takes half a minute)")
        probe = ablation.probe(*_model(self.config))
        self.tell(ablation.probe_table(probe))
        path = self.folder / f"{self.part}.json"
        io.write_json(path, {**result, "probe": probe})

    def _measure_swap(self, name: str, start: int) -> list[dict]:
        return self._measure(name, start, self.config)

    def _measure_trained(self, name: str, start: int) -> list[dict]:
        place = self.folder / "trained" / f"{name}-{start}"
        train = self.train.copy_and_resolve_references()
        train.out, train.seed, train.sample_every = str(place), start, 0
        train.distillation.policy = ablation.TRAINED[name]
        self.tell(f"{name}, start {start}: training in {place}")
        reached = run.open_training(run.read_config(train), tell=self.tell).run()
        if reached < train.steps:
            raise Stopped(
                f"{place}: Stopped at {reached}/{train.steps}. Rerun this command"
                " to resume."
            )
        config = self.config.copy_and_resolve_references()
        config.weights = str(place)
        return self._measure(name, start, config)

    def _measure(self, name: str, start: int, config) -> list[dict]:
        model, setup = _model(config)
        policy = ablation.ARMS[name].policy
        about = {
            "weights": model.digest,
            "trial": self.identity(),
            "config": config.to_json_best_effort(),
            "arm": repr(policy),
            "start": start,
        }

        def measure():
            interrupts.check()
            self.tell(f"{name}, start {start}: {self.trial.scripts} streams")
            arm = dataclasses.replace(setup, policy=policy)
            return ablation.measure(model, arm, self.trial, start)

        path = self.folder / self.part / f"{name}-{start}.json"
        return ablation.measure_once(path, about, measure)


PAPER = Ablation(AblationTrial, Comparison)


def _model(config):
    """Returns the weights, and the setup of their streams."""
    given = read_config(config)
    model = load_weights(given)
    resolved = resolve(given, model.metadata)
    script = Script((Segment("", 0), Segment("", 3)), 6)
    return model, make_setup(resolved, model, script)
