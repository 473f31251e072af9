"""One step of training for one Adaptor, or for several of one shape together.

Shape notation: k models, b pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from embedcache.stage_two.adaptor import Adaptor, count_parameters
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.distributed import Group
from embedcache.stage_two.feed import Batch
from embedcache.stage_two.losses import contrastive_loss, contrastive_share, siglip_loss, siglip_share

# On a CPU several models go through one batched step where a step is small: large matrix products keep its cores busy
# by themselves, and batched ones are slower there. In parameters times pairs; measured on 2 cores.
_BATCHED_WORK_OF_CPU = 5e7
_EAGER_STEPS = 3  # before a step is captured, its kernels and work spaces are set up by real steps


def loss_of(adaptor: Adaptor, image: Tensor, text: Tensor, codes: Tensor, config: TrainConfig) -> Tensor:
    """The loss of b embedded pairs.

    Args:
        image, text: unit vectors, (b, p).
        codes: equal where pairs are positives of each other, (b,).
    """
    logits = adaptor.logits(text, image)
    if config.loss == "siglip":
        return siglip_loss(logits, texts=codes)
    return contrastive_loss(logits, image_weight=config.image_weight, texts=codes)


class Steps:
    """k Adaptors of one shape and their optimisers; a step of all of them is one call.

    Each model is trained as it would be alone: its own batches, its own learning rate, its own gradient norm. Their
    weights are those of the modules that were given, all the time.

    Args:
        adaptors: differ in their weights alone.
        configs: one for each; they differ in `lr`, `weight_decay` and `seed` alone.
        group: the processes that share each batch; several only for a single model.
    """

    def __init__(self, adaptors: Sequence[Adaptor], configs: Sequence[TrainConfig], group: Group) -> None:
        self.adaptors, self.configs, self._group = list(adaptors), list(configs), group
        self._config, first = configs[0], adaptors[0]
        self._device = first.logit_scale.device
        self._on_gpu = self._device.type == "cuda"
        self._parameters = [list(adaptor.parameters()) for adaptor in self.adaptors]
        self.optimizers = [
            torch.optim.AdamW(
                parameters,
                lr=torch.tensor(config.lr, device=self._device) if self._on_gpu else config.lr,
                weight_decay=config.weight_decay,
                fused=True,
                capturable=self._on_gpu,
            )
            for parameters, config in zip(self._parameters, self.configs, strict=True)
        ]
        work = count_parameters(first) * self._config.batch_size
        self._batched = self._on_gpu or work < _BATCHED_WORK_OF_CPU
        self._set_up()

    def _set_up(self) -> None:
        together = self._batched and len(self.adaptors) > 1
        self._stacked = _stack(self.adaptors) if together else None
        captured = self._on_gpu and self._config.capture and self._group.size == 1
        self._captured = _Captured(self._step) if captured else None

    def step(self, batch: Batch, factor: float) -> Tensor:
        """Learns from a batch.

        Args:
            factor: of each model's learning rate.

        Returns:
            The loss of each model before the step, (k,); of this process's part of the batch where there are several.
        """
        for optimizer, config in zip(self.optimizers, self.configs, strict=True):
            for settings in optimizer.param_groups:
                if isinstance(settings["lr"], Tensor):
                    settings["lr"].fill_(config.lr * factor)
                else:
                    settings["lr"] = config.lr * factor
        return self._step(batch) if self._captured is None else self._captured(batch)

    def keep(self, chosen: Sequence[int]) -> None:
        """Goes on with some of the models alone; the others stay as they are."""
        self.adaptors = [self.adaptors[i] for i in chosen]
        self.configs = [self.configs[i] for i in chosen]
        self.optimizers = [self.optimizers[i] for i in chosen]
        self._parameters = [self._parameters[i] for i in chosen]
        self._set_up()

    def optimizer_state(self, i: int) -> dict[str, Tensor]:
        """AdamW's state of a model: `<number of the parameter>/exp_avg` and so on; empty before the first step."""
        state = self.optimizers[i].state
        return {f"{k}/{name}": value for k, p in enumerate(self._parameters[i]) for name, value in state[p].items()}

    def restore_optimizer(self, i: int, state: Mapping[str, Tensor]) -> None:
        """Takes over what `optimizer_state` gave."""
        for key, value in state.items():
            k, name = key.split("/")
            parameter = self._parameters[i][int(k)]
            self.optimizers[i].state[parameter][name] = value.to(parameter.device)

    def train(self) -> None:
        """Puts all models into training mode."""
        for adaptor in self.adaptors:
            adaptor.train()

    def _step(self, batch: Batch) -> Tensor:
        if self._stacked is None:  # one after the other, so that each finds its own gradients still at hand
            losses = []
            for i in range(len(self.adaptors)):
                losses.append(self._gradients_alone(i, batch))
                self._learn(i)
            return torch.stack(losses)
        together = self._gradients_together(self._stacked, batch)
        for i in range(len(self.adaptors)):
            self._learn(i)
        return together

    def _learn(self, i: int) -> None:
        """Moves a model's weights by the gradients that were left with them."""
        parameters = self._parameters[i]
        self._group.sum_([p.grad for p in parameters if p.grad is not None])
        if self._config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._config.clip_norm)
        self.optimizers[i].step()

    def _gradients_alone(self, i: int, batch: Batch) -> Tensor:
        """The loss of one model on its own batch; leaves each parameter's gradient with it."""
        parameters = self._parameters[i]
        loss = self._loss(self.adaptors[i], batch.each(lambda part: part[i]))
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient.contiguous()  # fused AdamW goes by address
        return loss.detach()

    def _gradients_together(self, stacked: dict[str, nn.Parameter], batch: Batch) -> Tensor:
        """The losses of all models, (k,), as one batched model; leaves each parameter's gradient with it."""
        base = _Loss(self.adaptors[0], self._loss)

        def one(parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
            return functional_call(base, {f"adaptor.{name}": p for name, p in parameters.items()}, (batch,))

        axes = batch.each(lambda part: 0)
        losses = vmap(one, in_dims=(0, axes), randomness="different")(stacked, batch)
        for k, gradients in enumerate(torch.autograd.grad(losses.sum(), list(stacked.values()))):
            for i, gradient in enumerate(gradients):
                self._parameters[i][k].grad = gradient.contiguous()
        return losses.detach()

    def _loss(self, adaptor: Adaptor, batch: Batch) -> Tensor:
        """Of one model; of this process's part of the batch where there are several."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16"):
            image, text = adaptor.embed(batch.image, batch.text, image_mask=batch.image_mask, text_mask=batch.text_mask)
        image, text = image.float(), text.float()
        if self._group.size == 1:
            return loss_of(adaptor, image, text, batch.codes, self._config)
        n = len(batch.all_codes)
        per_text = adaptor.logits(text, self._group.gathered(image, n))
        if self._config.loss == "siglip":
            return siglip_share(per_text, batch.codes, batch.all_codes)
        per_image = adaptor.logits(image, self._group.gathered(text, n))
        return contrastive_share(
            per_text, per_image, batch.codes, batch.all_codes, image_weight=self._config.image_weight
        )


class _Loss(nn.Module):
    """A model's loss as a module, so that torch can call it with other weights."""

    def __init__(self, adaptor: Adaptor, loss: Callable[[Adaptor, Batch], Tensor]) -> None:
        super().__init__()
        self.adaptor, self._of = adaptor, loss

    def forward(self, batch: Batch) -> Tensor:
        return self._of(self.adaptor, batch)


class _Captured:
    """A step recorded as a CUDA graph for each shape of batch: after that the host queues one call for all of it.

    The first steps run as they are, on a side stream, as capturing needs; they count like any other.
    """

    def __init__(self, step: Callable[[Batch], Tensor]) -> None:
        self._step, self._n_eager = step, 0
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        if self._n_eager < _EAGER_STEPS:
            self._n_eager += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                losses = self._step(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return losses
        shape = tuple(None if part is None else tuple(part.shape) for part in batch)
        if shape not in self._graphs:
            static = batch.each(torch.clone)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # rows may be read ahead meanwhile
                losses = self._step(static)
            self._graphs[shape] = (graph, static, losses)
        graph, static, losses = self._graphs[shape]
        for kept, given in zip(static, batch, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        graph.replay()
        return losses.clone()


def _stack(adaptors: Sequence[Adaptor]) -> dict[str, nn.Parameter]:
    """The parameters of all models in one tensor for each name, (k, ...), which each model's own are views of."""
    stacked = {}
    for name, _ in adaptors[0].named_parameters():
        own = [adaptor.get_parameter(name) for adaptor in adaptors]
        together = nn.Parameter(torch.stack([parameter.detach() for parameter in own]))
        for parameter, part in zip(own, together.detach(), strict=True):
            parameter.data = part
        stacked[name] = together
    return stacked
