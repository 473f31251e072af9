"""The training loop: epochs of steps, validation, early stopping, checkpoints; for one model or several together.

Shape notation: k models, s batches of an epoch, n validation pairs, p width of the shared space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedcache.device import on_device
from embedcache.errors import RunStateError, TrainingError, some_ids
from embedcache.progress import Progress
from embedcache.stage_two.adaptor import Adaptor, read_adaptor
from embedcache.stage_two.alignment import alignment, embed_pairs, unfit_pairs
from embedcache.stage_two.batches import Plan, Planner
from embedcache.stage_two.checkpoint import read_checkpoint, write_checkpoint
from embedcache.stage_two.config import TrainConfig, schedule
from embedcache.stage_two.distributed import Group
from embedcache.stage_two.feed import Feed, ahead
from embedcache.stage_two.files import write_tensors
from embedcache.stage_two.steps import Steps, loss_of

_LOOK_EVERY_S = 1.0  # on a GPU, looking at the loss waits for it
LAST = "last.safetensors"

Entry = dict[str, float]


@dataclass
class Course:
    """One model on its way.

    Args:
        run_dir: gets `metrics.jsonl` and `metrics.csv`, and in the end `adaptor.safetensors` (the best weights),
            `config.json` and `last.safetensors`.
        history: an entry for each finished epoch.
        best_weights: of the epoch with the lowest validation loss; without validation, of the last.
        stopped: whether it has come to its end; the best weights are in the adaptor then.
    """

    adaptor: Adaptor
    config: TrainConfig
    run_dir: Path
    history: list[Entry] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stopped: bool = False

    def add(self, entry: Entry) -> None:
        """Takes note of an epoch, keeps the weights if they are the best so far, and stops if it is time."""
        self.history.append(entry)
        epoch, loss = len(self.history) - 1, entry["valid_loss"]
        if epoch == 0 or loss < self.history[self.best_epoch]["valid_loss"] or math.isnan(loss):
            self.best_epoch = epoch
            self.best_weights = {name: value.clone() for name, value in self.adaptor.state_dict().items()}
        self.stopped = epoch + 1 == self.config.epochs or epoch - self.best_epoch >= self.config.patience

    def finish(self, *, write: bool) -> None:
        """Puts the best weights into the adaptor.

        Args:
            write: whether this process writes the files.
        """
        if write:
            write_tensors(self.run_dir / LAST, self.adaptor.state_dict())
        self.adaptor.load_state_dict(self.best_weights)
        self.adaptor.eval()
        if write:
            self.adaptor.save_pretrained(self.run_dir)


def fit(
    courses: Mapping[str, Course],
    feed: Feed,
    valid: Feed,
    planner: Planner,
    *,
    group: Group,
    checkpoint: Path,
    identity: str,
    begin: Callable[[], None],
    log: Callable[[str, Entry], None],
) -> None:
    """Trains all models until each has stopped; goes on from the checkpoint where there is one.

    Args:
        courses: by name; configs that differ in `lr`, `weight_decay` and `seed` alone.
        checkpoint: the file; its state is written every `checkpoint_s` seconds, and at the end.
        identity: see `write_checkpoint`.
        begin: called in the first process before the first step, once it is known which models are finished.
        log: called in the first process with a model's name and its entry, for each epoch from the first on.

    Raises:
        TrainingError: a loss that is not finite; the message names the ids of the batch.
    """
    run = _Run(courses, feed, valid, planner, group, checkpoint, identity)
    if group.is_first:
        begin()
    devices = [feed.device] if feed.device != "cpu" else []
    with torch.random.fork_rng(devices=devices), on_device(feed.device):
        run.go(log)


class _Run:
    def __init__(
        self,
        courses: Mapping[str, Course],
        feed: Feed,
        valid: Feed,
        planner: Planner,
        group: Group,
        checkpoint: Path,
        identity: str,
    ) -> None:
        self._courses, self._feed, self._valid, self._planner = courses, feed, valid, planner
        self._group, self._path, self._identity = group, checkpoint, identity
        self._config = next(iter(courses.values())).config
        self._epoch, self._step, self._seconds = 0, 0, 0.0
        self._losses: Tensor | None = None  # of the steps of this epoch, (s, k)
        self._random: Tensor | None = None  # state of the generator in the middle of an epoch
        self._going = list(courses)
        self._steps = Steps(
            [course.adaptor for course in courses.values()], [course.config for course in courses.values()], group
        )
        self._restore()
        self._n_batches = planner.n_batches()
        n_steps = self._config.epochs * self._n_batches
        self._factor = schedule(self._config.schedule, n_steps, round(self._config.warmup * n_steps))
        self._saved = time.monotonic()

    def go(self, log: Callable[[str, Entry], None]) -> None:
        """Runs epochs until every model has stopped."""
        if self._group.is_first:
            for name, course in self._courses.items():
                for entry in course.history:
                    log(name, entry)
        n_pairs, plans_ahead = len(self._feed.pairs), ahead(self._plans(self._epoch))
        with Progress(
            "training the Adaptor",
            total=self._config.epochs * n_pairs,
            unit="pair",
            done=self._epoch * n_pairs,
            shown=self._group.is_first,
        ) as progress:
            while self._going:
                plans = next(plans_ahead)
                plans_of = [plans[name] for name in self._going]
                started = time.monotonic() - self._seconds
                self._train_epoch(plans_of, progress, started)
                losses = self._read_losses(plans_of)  # waits for the device
                trained = time.monotonic() - started
                for i, name in enumerate(self._going):
                    entry = self._group.told(self._entry(name, losses[:, i], trained, started))
                    self._courses[name].add(entry)
                    if self._group.is_first:
                        log(name, entry)
                self._drop_stopped()
                self._epoch, self._step, self._seconds, self._losses = self._epoch + 1, 0, 0.0, None
                if not self._going or self._due():
                    self._save()
        plans_ahead.close()

    def _plans(self, first: int) -> Generator[dict[str, Plan], None, None]:
        """The plan of each model that goes on, epoch by epoch; runs in a thread, an epoch ahead."""
        for epoch in range(first, self._config.epochs):
            yield {name: self._planner.plan(seed=self._courses[name].config.seed, epoch=epoch) for name in self._going}

    def _train_epoch(self, plans: Sequence[Plan], progress: Progress, started: float) -> None:
        n, device = plans[0].n_batches, self._feed.device
        if self._losses is None:
            self._losses = torch.zeros(n, len(plans), device=device)
        if self._random is None:
            torch.manual_seed(_epoch_seed(self._courses[self._going[0]].config.seed, self._epoch, self._group.rank))
        else:
            _set_random(self._random, device)
            self._random = None
        self._steps.train()
        looked = time.monotonic()
        for batch in self._feed.epoch(plans, first=self._step):
            at = self._epoch * self._n_batches + self._step * self._n_batches / n
            self._losses[self._step] = self._steps.step(batch, self._factor(at))
            self._step += 1
            note = ""
            if time.monotonic() - looked >= _LOOK_EVERY_S:
                self._check_losses(plans)
                looked = time.monotonic()
                note = f"epoch {self._epoch + 1}, loss {float(self._losses[self._step - 1].mean()):.3f}"
            progress.advance(int(plans[0].starts[self._step] - plans[0].starts[self._step - 1]), note)
            if self._group.size == 1 and self._step < n and self._due():
                self._check_losses(plans)
                self._seconds = time.monotonic() - started
                self._save()

    def _read_losses(self, plans: Sequence[Plan]) -> np.ndarray:
        """Of all processes' parts together, (s, k)."""
        assert self._losses is not None  # an epoch was trained
        self._group.sum_([self._losses])
        self._check_losses(plans)
        for name in self._going:
            norms = torch.stack(torch._foreach_norm(list(self._courses[name].adaptor.parameters())))
            if not bool(torch.isfinite(norms).all()):
                raise TrainingError(
                    f"weights{self._whose(name)} are not finite after epoch {self._epoch + 1}; lower lr "
                    f"({self._courses[name].config.lr}), or set clip_norm"
                )
        return self._losses.double().cpu().numpy()

    @staticmethod
    def _whose(name: str) -> str:
        return f" of {name!r}" if name else ""

    def _check_losses(self, plans: Sequence[Plan]) -> None:
        assert self._losses is not None
        losses = self._losses[: self._step].cpu()
        bad = (~torch.isfinite(losses)).nonzero()
        if not len(bad):
            return
        step, i = bad[0].tolist()
        plan, name = plans[i], self._going[i]
        ids = self._feed.pairs.ids[plan.pairs[plan.starts[step] : plan.starts[step + 1]]]
        raise TrainingError(
            f"the training loss{self._whose(name)} became {float(losses[step, i])} in epoch {self._epoch + 1}, step "
            f"{step + 1}, in the batch of {some_ids(ids)}; lower lr "
            f"({self._courses[name].config.lr}), set clip_norm, or check the stores with 'embedcache verify'"
        )

    def _entry(self, name: str, losses: np.ndarray, trained: float, started: float) -> Entry:
        """What is told of an epoch; of several processes the first measures and the others wait for it."""
        if not self._group.is_first:
            return {}
        course = self._courses[name]
        measured = validated(course.adaptor, self._valid, course.config)
        n = self._n_batches
        return {
            "epoch": self._epoch,
            "train_loss": float(losses.mean()),
            **measured,
            "lr": course.config.lr * self._factor((self._epoch + 1) * n),
            "logit_scale": float(course.adaptor.logit_scale.detach().exp()),
            "pairs_per_s": len(self._feed.pairs) * len(self._going) / trained,
            "seconds": time.monotonic() - started,
        }

    def _drop_stopped(self) -> None:
        going = []
        for i, name in enumerate(self._going):
            if self._courses[name].stopped:
                self._courses[name].finish(write=self._group.is_first)
            else:
                going.append(i)
        if len(going) < len(self._going):
            self._going = [self._going[i] for i in going]
            if going:
                self._steps.keep(going)

    def _due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return self._group.told(time.monotonic() - self._saved >= self._config.checkpoint_s)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}

        def put(prefix: str, values: Mapping[str, Tensor]) -> None:
            tensors.update({f"{prefix}/{name}": value for name, value in values.items()})

        for i, name in enumerate(self._going):  # of the others all is in their run directories
            put(f"last/{name}", self._courses[name].adaptor.state_dict())
            put(f"best/{name}", self._courses[name].best_weights)
            put(f"optimizer/{name}", self._steps.optimizer_state(i))
        if self._step:
            assert self._losses is not None
            put("epoch", {"losses": self._losses, "random": _random(self._feed.device)})
        said = {
            "epoch": self._epoch,
            "step": self._step,
            "made_by": self._makers(),
            "seconds": self._seconds,
            "courses": {
                name: {
                    "history": [without_nan(entry) for entry in course.history],
                    "best_epoch": course.best_epoch,
                    "stopped": course.stopped,
                }
                for name, course in self._courses.items()
            },
        }
        if self._group.is_first:
            write_checkpoint(self._path, tensors, said, identity=self._identity)
        self._saved = time.monotonic()

    def _makers(self) -> str:
        """What the random numbers of an epoch depend on, beside its seed."""
        return f"{self._group.size} process{'es' if self._group.size > 1 else ''} on {self._feed.device.split(':')[0]}"

    def _restore(self) -> None:
        """Goes back to where the checkpoint was written."""
        found = read_checkpoint(self._path, identity=self._identity)
        if found is None:
            return
        tensors, said = found

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        if said["step"] and said["made_by"] != self._makers():
            raise RunStateError(
                f"{self._path}: was left in the middle of an epoch by {said['made_by']}; with {self._makers()} the run "
                "would not end as it began: go on with the same, or delete the file"
            )
        self._epoch, self._step, self._seconds = said["epoch"], said["step"], said["seconds"]
        for i, (name, course) in enumerate(self._courses.items()):
            of_course = said["courses"][name]
            course.history = [with_nan(entry) for entry in of_course["history"]]
            course.best_epoch, course.stopped = of_course["best_epoch"], of_course["stopped"]
            if course.stopped:
                course.adaptor.load_state_dict(read_adaptor(course.run_dir).state_dict())
                course.adaptor.eval()
                continue
            course.adaptor.load_state_dict(under(f"last/{name}/"))
            device = self._feed.device
            course.best_weights = {n: value.to(device) for n, value in under(f"best/{name}/").items()}
            self._steps.restore_optimizer(i, under(f"optimizer/{name}/"))
        self._going = [name for name, course in self._courses.items() if not course.stopped]
        if 0 < len(self._going) < len(self._courses):
            self._steps.keep([i for i, course in enumerate(self._courses.values()) if not course.stopped])
        if self._step:
            self._losses, self._random = tensors["epoch/losses"].to(self._feed.device), tensors["epoch/random"]


@torch.inference_mode()
def validated(adaptor: Adaptor, feed: Feed, config: TrainConfig) -> Entry:
    """Loss and alignment over a validation split in a fixed order; the loss is NaN, and alone, below two pairs.

    Raises:
        TrainingError: a loss that is not finite.
    """
    pairs = feed.pairs
    if len(pairs) < 2:
        return {"valid_loss": math.nan}
    image, text = embed_pairs(adaptor, feed)
    codes = torch.from_numpy(pairs.codes).to(feed.device)
    total, n = 0.0, 0
    for start in range(0, len(pairs), config.batch_size):
        part = slice(start, start + config.batch_size)
        if len(codes[part]) > 1:  # one pair has nothing to contrast with
            total += float(loss_of(adaptor, image[part], text[part], codes[part], config)) * len(codes[part])
            n += len(codes[part])
    loss = total / n
    if not math.isfinite(loss):
        bad = unfit_pairs(image, text)
        of = f" with the pairs {some_ids(pairs.ids[bad])}" if bad.any() else ""
        raise TrainingError(
            f"the validation loss became {loss}{of}; lower lr ({config.lr}), or check the stores with "
            "'embedcache verify'"
        )
    return {"valid_loss": loss, **alignment(image, text, pairs.texts)}


def without_nan(entry: Mapping[str, float]) -> dict[str, float | None]:
    """An entry as JSON can hold it."""
    return {name: None if math.isnan(value) else value for name, value in entry.items()}


def with_nan(entry: Mapping[str, float | None]) -> Entry:
    """An entry as it was before `without_nan`."""
    return {name: math.nan if value is None else value for name, value in entry.items()}


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed of its own for each epoch and process."""
    return int(np.random.SeedSequence([abs(seed), int(seed < 0), epoch, rank]).generate_state(1, np.uint64)[0] >> 1)


def _random(device: str) -> Tensor:
    """The state of the generator that dropout draws from."""
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(device)


def _set_random(state: Tensor, device: str) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
