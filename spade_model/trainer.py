"""The networks, optimizers and losses of one training step; `training.py` contains the training loop."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spade_kernels.normalization import world_size
from spade_model import checkpoint, losses
from spade_model.config import TrainConfig
from spade_model.data import Batch
from spade_model.ema import EMA
from spade_model.errors import UserError
from spade_model.networks import build_discriminator, build_encoder, build_generator, initialize, load_vgg19

# The option was renamed after torch 2.11.
_BUFFER_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains the generator (with its encoder) and the discriminator against each other.

    With an initialised process group the networks are wrapped in DistributedDataParallel: a step then equals the
    step of a single process over the batches of all processes.

    Args:
        config: options of the run. device: device of the networks.
    """

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu"):
        self.config, self.device = config, torch.device(device)
        data, model = config.data, config.model

        def ready(network: nn.Module) -> nn.Module:
            return initialize(network, model.init_type, model.init_variance).to(self.device).train()

        self.generator = ready(build_generator(data, model))
        self.discriminator = ready(build_discriminator(data, model))
        encoder = build_encoder(data, model)
        self.encoder = None if encoder is None else ready(encoder)
        self.vgg = None if config.no_vgg_loss else load_vgg19(config.vgg_weights).to(self.device)
        self.ema = None
        if config.ema_decay:
            twin = build_generator(data, model).to(self.device)
            self.ema = EMA(twin, self.generator, config.ema_decay)

        self._parallel_generator = self._parallel(self.generator)
        self._parallel_discriminator = self._parallel(self.discriminator)
        self._parallel_encoder = None if self.encoder is None else self._parallel(self.encoder)
        generator_parameters = [*self.generator.parameters(), *(self.encoder.parameters() if self.encoder else ())]
        betas = config.beta1, config.beta2
        self.optimizer_G = torch.optim.Adam(generator_parameters, lr=config.lr, betas=betas)
        self.optimizer_D = torch.optim.Adam(self.discriminator.parameters(), lr=config.lr, betas=betas)
        fp16 = config.precision == "fp16"
        self.scaler_G = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.scaler_D = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.steps = 0
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Sets the learning rates of the epoch, counted from 1."""
        for optimizer, rate in zip(
            (self.optimizer_G, self.optimizer_D), learning_rates(self.config, epoch), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """Takes one optimizer step over `config.accumulate` batches.

        Every D_steps_per_G-th call updates the generator first; every call updates the discriminator.

        Returns:
            The weighted losses by name, averaged over the batches, and the generated images of the last batch.

        Raises:
            UserError: photographs and generated images differ in size.
        """
        batches = [batch.to(self.device, non_blocking=True) for batch in batches]
        reports: list[dict[str, Tensor]] = []
        if self.steps % self.config.D_steps_per_G == 0:
            reports.append(self._generator_step(batches))
        discriminator_report, fake = self._discriminator_step(batches)
        reports.append(discriminator_report)
        self.steps += 1
        if self.ema is not None:
            self.ema.update(self.generator)
        return {name: value for report in reports for name, value in report.items()}, fake

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of networks, optimizers and gradient scalers, and the number of steps."""
        state: dict[str, Any] = {
            "G": self.generator.state_dict(),
            "D": self.discriminator.state_dict(),
            "optimizer_G": self.optimizer_G.state_dict(),
            "optimizer_D": self.optimizer_D.state_dict(),
            "scaler_G": self.scaler_G.state_dict(),
            "scaler_D": self.scaler_D.state_dict(),
            "steps": self.steps,
        }
        if self.encoder is not None:
            state["E"] = self.encoder.state_dict()
        if self.ema is not None:
            state["G_ema"] = self.ema.network.state_dict()
        return state

    def first_nonfinite(self) -> str | None:
        """Returns the network and name of the first weight or buffer that is not finite; None if all are finite."""
        networks = nn.ModuleDict({"G": self.generator, "D": self.discriminator})
        if self.encoder is not None:
            networks["E"] = self.encoder
        return next((name for name, value in networks.state_dict().items() if not value.isfinite().all()), None)

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Loads a state that `state_dict` returned. Raises UserError if it is incomplete or of other networks."""
        for name in ("optimizer_G", "optimizer_D", "scaler_G", "scaler_D", "steps"):
            if name not in state:
                raise UserError(
                    f"{source} holds no {name}, so no run can be resumed from it; pass a file that `spade train` wrote"
                )
        if self.encoder is None and "E" in state:
            raise UserError(f"{source} was trained with --use_vae; continue with it")
        networks = {"G": self.generator, "D": self.discriminator}
        if self.encoder is not None:
            networks["E"] = self.encoder
        if self.ema is not None:
            networks["G_ema"] = self.ema.network
        for name, network in networks.items():
            if name not in state:
                raise UserError(f"{source} holds no {name}; resume with the options it was trained with")
            checkpoint.load_into(network, state[name], source)
        self.optimizer_G.load_state_dict(state["optimizer_G"])
        self.optimizer_D.load_state_dict(state["optimizer_D"])
        for scaler, saved in ((self.scaler_G, state["scaler_G"]), (self.scaler_D, state["scaler_D"])):
            # The saved state is empty unless the run used fp16; the new scaler then keeps its initial state.
            if saved:
                scaler.load_state_dict(saved)
        self.steps = state["steps"]

    def _generator_step(self, batches: list[Batch]) -> dict[str, Tensor]:
        self.optimizer_G.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(False)
        parallel = [self._parallel_generator, self._parallel_encoder]
        report: list[dict[str, Tensor]] = []
        for i, batch in enumerate(batches):
            with self._last_only(parallel, i == len(batches) - 1):
                with self._autocast():
                    terms = self._generator_losses(batch)
                self.scaler_G.scale(sum(terms.values()) / len(batches)).backward()  # type: ignore[arg-type]
            report.append(terms)
        self.discriminator.requires_grad_(True)
        self.scaler_G.step(self.optimizer_G)
        self.scaler_G.update()
        return _mean(report)

    def _discriminator_step(self, batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        self.optimizer_D.zero_grad(set_to_none=True)
        report: list[dict[str, Tensor]] = []
        for i, batch in enumerate(batches):
            with torch.no_grad(), self._autocast():
                z = None if self.encoder is None else _sample(*self.encoder(batch.image))
                fake = self.generator(batch.segmap, z)
            with self._last_only([self._parallel_discriminator], i == len(batches) - 1):
                with self._autocast():
                    on_fake, on_real = self._discriminate(self._parallel_discriminator, fake, batch)
                    mode = self.config.gan_mode
                    terms = {
                        "D_Fake": losses.gan_loss(on_fake, mode, is_real=False, for_discriminator=True),
                        "D_real": losses.gan_loss(on_real, mode, is_real=True, for_discriminator=True),
                    }
                if self.config.r1_gamma:
                    terms["D_R1"] = self._r1_penalty(batch) * self.config.r1_gamma
                self.scaler_D.scale(sum(terms.values()) / len(batches)).backward()  # type: ignore[arg-type]
            report.append(terms)
        self.scaler_D.step(self.optimizer_D)
        self.scaler_D.update()
        return _mean(report), fake

    def _generator_losses(self, batch: Batch) -> dict[str, Tensor]:
        config, terms, z = self.config, {}, None
        if self._parallel_encoder is not None:
            mu, logvar = self._parallel_encoder(batch.image)
            z = _sample(mu, logvar)
            # The KL divergence is a sum over the batch; gradients are averaged over processes and accumulated batches.
            terms["KLD"] = losses.kld_loss(mu, logvar) * config.lambda_kld * world_size() * config.accumulate
        fake = self._parallel_generator(batch.segmap, z)
        on_fake, on_real = self._discriminate(self.discriminator, fake, batch)
        terms["GAN"] = losses.gan_loss(on_fake, config.gan_mode, is_real=True, for_discriminator=False)
        if not config.no_ganFeat_loss:
            terms["GAN_Feat"] = losses.feature_matching_loss(on_fake, on_real) * config.lambda_feat
        if self.vgg is not None:
            with torch.no_grad():
                real = self.vgg(batch.image)
            terms["VGG"] = losses.vgg_loss(self.vgg(fake), real) * config.lambda_vgg
        return terms

    def _r1_penalty(self, batch: Batch) -> Tensor:
        """Returns the R1 penalty on the photographs, computed in float32 for every --precision."""
        assert batch.image is not None
        image = batch.image.detach().requires_grad_()
        # This calls the plain network, because compiled code cannot be differentiated twice. DistributedDataParallel
        # averages these gradients too, because its hooks belong to the parameters.
        with torch.autocast(self.device.type, enabled=False):
            return losses.r1_penalty(self.discriminator(batch.segmap, image), image)

    def _discriminate(self, discriminator: nn.Module, fake: Tensor, batch: Batch):
        real = batch.image
        assert real is not None
        if fake.shape != real.shape:
            raise _size_error(fake, batch)
        results = discriminator(batch.segmap, torch.cat((fake.to(real.dtype), real)))
        count = len(real)
        return [[f[:count] for f in scale] for scale in results], [[f[count:] for f in scale] for scale in results]

    def _parallel(self, network: nn.Module) -> nn.Module:
        if self.config.compile:
            network = torch.compile(network)  # type: ignore[assignment]
        if world_size() == 1:
            return network
        # Buffers are equal in all processes: spectral vectors depend on the weights, and statistics are synchronized.
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, **{_BUFFER_OPTION: False})  # type: ignore[arg-type]

    def _last_only(self, networks: Sequence[nn.Module | None], last: bool):
        """Returns a context in which processes exchange gradients only if this is the last accumulated batch."""
        stack = ExitStack()
        for network in networks:
            if isinstance(network, DistributedDataParallel) and not last:
                stack.enter_context(network.no_sync())
        return stack

    def _autocast(self):
        dtype = _PRECISIONS.get(self.config.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def learning_rates(config: TrainConfig, epoch: int) -> tuple[float, float]:
    """Returns the learning rates of generator and discriminator in an epoch, counted from 1.

    They are constant for niter epochs and then decay linearly to zero over niter_decay epochs.
    """
    lr = config.lr
    if config.niter_decay:
        lr -= max(0, epoch - 1 - config.niter) * (config.lr / config.niter_decay)
    return (lr, lr) if config.no_TTUR else (lr / 2, lr * 2)


def _size_error(fake: Tensor, batch: Batch) -> UserError:
    assert batch.image is not None
    (height, width), (made_height, made_width) = batch.image.shape[2:], fake.shape[2:]
    return UserError(
        f"{batch.names[0]} is {width}x{height} pixels after preprocessing, but the generator makes "
        f"{made_width}x{made_height}. Choose --crop_size and --aspect_ratio for the images' size, or a "
        "--preprocess_mode that gives them this size (resize_and_crop, fixed)"
    )


def _sample(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.randn_like(mu) * (0.5 * logvar).exp()


def _mean(reports: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([r[name].detach() for r in reports]).mean() for name in reports[0]}
