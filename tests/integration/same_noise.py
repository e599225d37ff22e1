"""Fits whose random draws are kept on each process, and the same fits on one process with all of these draws together."""

from functools import partial

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from mar_util import NO_DROPOUT, trained_like
from tinyfusion_pl import DepthPruningCallback, MaskLearning, Recovery, create_model
from tinyfusion_pl.callbacks import EMAWithWarmup, NonFiniteGuard
from tinyfusion_pl.distill import Distillation
from tinyfusion_pl.objectives import GaussianDiffusion, Interpolants, MaskedAutoregression
from tinyfusion_pl.pruning import Decision
from tinyfusion_pl.pruning.decision import GroupDecision, StackDecision
from tinyfusion_pl.pruning.masks import Masks
from tinyfusion_pl.pruning.sharding import is_sharded, whole

BATCH, NUM_STEPS, NUM_MASKED = 4, 2, 10
SGD = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)
OBJECTIVES = {
    "gaussian": GaussianDiffusion,
    "interpolant": Interpolants,
    "mar": partial(MaskedAutoregression, num_noised=2),
}
DISTILLATIONS = {
    "finetune": {"weight_kd": 0, "weight_data": 1, "weight_feature": 0},
    "output": {"weight_feature": 0},
    "representation": {"feature_mask": "none"},
    "masked": {},
    "lift": {"weight_feature": 0, "output_loss": "lift"},
    "interval": {"weight_feature": 0, "weight_interval": 1.0, "interval_share": 0.5},
    "interval_beside": {"weight_feature": 0, "weight_interval": 1.0},
}
SEARCHES = {  # name -> objective, arguments of the callback
    **{
        f"search-{name}-{update}": (name, {"weight_update": update})
        for name in OBJECTIVES
        for update in ("frozen", "lora", "full")
    },
    "search-gaussian-kept": ("gaussian", {"weight_update": "full", "straight_through": "kept"}),
    "search-gaussian-hard_concrete": (
        "gaussian",
        {"weight_update": "full", "relaxation": "hard_concrete"},
    ),
    "search-gaussian-teacher": ("gaussian", {"weight_update": "full", "search_loss": "teacher"}),
    "search-gaussian-opposite": ("gaussian", {"weight_update": "full"}),
    "search-uvit-full": ("noise", {"weight_update": "full"}),
}
RECOVERIES = {
    **{f"recovery-gaussian-{each}": ("gaussian", each) for each in DISTILLATIONS},
    **{f"recovery-{name}-masked": (name, "masked") for name in ("interpolant", "mar")},
}
CASES = [*SEARCHES, *RECOVERIES]
SHARDED = ("search-gaussian-frozen", "search-gaussian-full", "search-gaussian-opposite", "search-gaussian-hard_concrete",
           "search-interpolant-full", "search-mar-full", "search-uvit-full", "recovery-gaussian-output", "recovery-gaussian-masked",
           "recovery-gaussian-lift", "recovery-interpolant-masked", "recovery-mar-masked")  # fmt: skip
RESUMED = ("search-gaussian-frozen", "search-gaussian-full", "recovery-gaussian-masked")


def denoiser(name, *, depth=4):
    """A small model of random weights, equal for equal arguments."""
    torch.manual_seed(3)
    if name == "mar":
        return trained_like(encoder_depth=depth, decoder_depth=2, **NO_DROPOUT)
    sizes = {"depth": depth, "hidden_size": 16, "num_heads": 2, "input_size": 4, "num_classes": 5}
    kind = {"interpolant": "sit_s_2", "noise": "uvit_s_2"}.get(name, "dit_digits")
    extra = {} if name == "gaussian" else {"patch_size": 1, "in_channels": 1}
    model = create_model(kind, **sizes, **extra)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(
                p, std=0.1 if name == "interpolant" else 0.2
            )  # its losses are larger
    return model


def decision(name):
    """Every second block stays."""

    def of(depth):
        groups = [
            GroupDecision(i, 1, 2, [0], confidence=1.0, entropy=0.0, probabilities=[1.0, 0.0])
            for i in range(0, depth, 2)
        ]
        return StackDecision(
            "1:2",
            depth,
            list(range(0, depth, 2)),
            [1.0, 0.0] * (depth // 2),
            groups,
            units=[[i] for i in range(depth)],
        )

    return Decision({"encoder_blocks": of(4), "decoder_blocks": of(2)} if name == "mar" else {"blocks": of(4)})  # fmt: skip


class Double(Callback):
    """Gate logits, which stay in float32 otherwise."""

    def setup(self, trainer, pl_module, stage):
        for tensor in [
            t
            for gates in pl_module.depth_gates.stacks
            for t in (*gates.parameters(), *gates.buffers())
        ]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()


def made(case, *, double=True):
    """(module, callbacks) of a case."""
    seed_everything(7)
    if case in SEARCHES:
        name, options = SEARCHES[case]
        objective = GaussianDiffusion(learn_sigma=False) if name == "noise" else OBJECTIVES[name]()
        budget = {"keep": 2} if "hard_concrete" in case else {"pattern": "1:2"}
        taus = {} if "keep" in budget else {"tau_start": 1.0, "tau_end": 1.0}
        pruning = DepthPruningCallback(
            **budget, init=0.0, logits_lr=0.01, scaling=1.0, **taus, **options
        )
        module = MaskLearning(denoiser(name), objective=objective, optimizer=SGD, label_dropout=0.5)
        return module, [pruning, *([Double()] if double else [])]
    name, distill = RECOVERIES[case]
    student = (
        trained_like(encoder_depth=2, decoder_depth=1, **NO_DROPOUT)
        if name == "mar"
        else denoiser(name, depth=2)
    )
    teacher = denoiser(name).double() if double else denoiser(name)
    return Recovery(
        student,
        teacher=teacher,
        decision=decision(name),
        distillation=Distillation(**DISTILLATIONS[distill]),
        objective=OBJECTIVES[name](),
        optimizer=SGD,
        label_dropout=0.5,
    ), [NonFiniteGuard(), EMAWithWarmup(decay=0.5)]


def data(case):
    """Alike on both processes, so that only the drawing can differ."""
    channels = 3 if "-mar" in case else 1
    x = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(1)).expand(
        8 * BATCH, -1, -1, -1
    )
    return TensorDataset(x, torch.zeros(8 * BATCH, dtype=torch.long))


class Drawn(Callback):
    """By step: what was drawn, gradients and logits after the backward pass, weights after the step."""

    def __init__(self, module):
        self.steps, self.start = [], {}
        objective, draw, column = module.objective, module.objective.draw, Masks._noise

        def drawing(x0, **given):
            if isinstance(objective, MaskedAutoregression):  # a number of the whole batch
                given = {"num_masked": NUM_MASKED, "order": torch.rand(len(x0), 16).argsort(1)}
            drawn = draw(x0, **given)
            self.steps[-1] |= {
                "x0": x0,
                "t": drawn.t,
                "noise": drawn.noise,
                **{k: v for k, v in given.items() if k == "order"},
            }
            return drawn

        def masks_noise(masks, gates, num_samples):
            noise = column(masks, gates, num_samples)
            if num_samples == BATCH and self.steps:
                self.steps[-1].setdefault("masks", {})[gates.path] = noise
            return noise

        objective.draw, Masks._noise = drawing, masks_noise
        self.undo = lambda: setattr(Masks, "_noise", column)

    def on_train_start(self, trainer, pl_module):
        self.start = weights(pl_module)
        drop = pl_module.drop_labels

        def drop_labels(y):
            self.steps[-1]["y"] = drop(y)
            return self.steps[-1]["y"]

        pl_module.drop_labels = drop_labels

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append({})

    def on_after_backward(self, trainer, pl_module):
        self.steps[-1]["gradients"] = gradients(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps[-1]["after"] = weights(pl_module)


def weights(module):
    return {name: whole(p.detach()).clone() for name, p in module.named_parameters()}


def gradients(module):
    """Of a sharded module without those of its gate logits, which are averaged where they step."""
    named = ((name, p) for name, p in module.named_parameters() if p.grad is not None)
    return {
        name: whole(p.grad).clone()
        for name, p in named
        if not (is_sharded(module) and "depth_gates" in name)
    }


class Averages(Callback):
    """The averaged weights at the end, before they are copied over the others."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.found = [
            weights(c._average_model.module.denoiser)
            for c in trainer.callbacks
            if isinstance(c, EMAWithWarmup)
        ]


class Saved(Callback):
    """A checkpoint after the first step."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 1:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/step1.ckpt")


class Opposite(Callback):
    """All samples of the first process keep the first unit of each group, all of the second the other one."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        gates = pl_module.depth_gates
        chosen = torch.zeros(BATCH, 2)
        chosen[:, trainer.global_rank] = 1e4
        gates.fix_noise({g.path: [chosen.clone() for _ in g.groups] for g in gates.stacks})


class Replayed(Callback):
    """The draws of all processes as one batch of one process, from the same weights; keeps gradients and weights."""

    def __init__(self, module, ranks):
        self.ranks, self.step, self.gradients, self.after = ranks, -1, [], []
        draw = module.objective.draw

        def drawing(x0):
            given = {"num_masked": NUM_MASKED} if "order" in self.ranks[0]["steps"][0] else {}
            names = [name for name in ("t", "noise", "order") if name in self.ranks[0]["steps"][0]]
            return draw(
                self.together("x0"), **given, **{name: self.together(name) for name in names}
            )

        module.objective.draw = drawing
        module.drop_labels = lambda y: self.together("y")

    def together(self, name):
        return torch.cat([rank["steps"][self.step][name] for rank in self.ranks])

    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            for name, p in pl_module.named_parameters():
                p.copy_(self.ranks[0]["start"][name])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step += 1
        if (gates := getattr(pl_module, "depth_gates", None)) is not None:
            noises = [rank["steps"][self.step]["masks"] for rank in self.ranks]
            gates.fix_noise(
                {
                    path: [torch.cat(each) for each in zip(*(n[path] for n in noises))]
                    for path in noises[0]
                }
            )

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append(gradients(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after.append(weights(pl_module))


def fit(module, callbacks, dataset, folder, *, batch_size=BATCH, ckpt_path=None, **kwargs):
    options = {
        "accelerator": "cpu",
        "max_steps": NUM_STEPS,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    trainer = Trainer(**{**options, **kwargs}, callbacks=callbacks)
    trainer.fit(
        module, DataLoader(dataset, batch_size=batch_size), ckpt_path=ckpt_path, weights_only=True
    )
    return trainer


def on_each_process(case, folder, *, strategy="ddp"):
    """The fit of a case on two processes; leaves what each drew, and what came of it. In float64, where nothing is sharded."""
    sharded = strategy == "fsdp2"
    options = {"devices": 2, "strategy": strategy, "precision": "32-true" if sharded else "64-true"}

    def run(*more, **kwargs):
        module, callbacks = made(case, double=not sharded)
        drawn, averages = Drawn(module), Averages()
        opposite = [Opposite()] if case.endswith("opposite") else []
        trainer = fit(
            module,
            [*callbacks, *opposite, averages, drawn, *more],
            data(case),
            folder,
            **options,
            **kwargs,
        )
        drawn.undo()
        pruned = [each for each in callbacks if isinstance(each, DepthPruningCallback)]
        left = {
            "steps": drawn.steps,
            "start": drawn.start,
            "averages": averages.found,
            "kept": [each.decision.kept_blocks for each in pruned],
            "shallow": [each.shallow_model.state_dict() for each in pruned],
        }
        return left, trainer.global_rank

    resumes = sharded and case in RESUMED
    left, rank = run(*([Saved()] if resumes else []))
    if resumes:
        left["resumed"] = run(ckpt_path=folder / "step1.ckpt")[0]
    torch.save(left, folder / f"rank{rank}.pt")


def on_one_process(case, folder, ranks, *, double=True):
    """The same with the draws of all of them as one batch."""
    module, callbacks = made(case, double=double)
    replayed, averages, size = Replayed(module, ranks), Averages(), BATCH * len(ranks)
    fit(
        module,
        [*callbacks, averages, replayed],
        data(case),
        folder,
        batch_size=size,
        devices=1,
        precision="64-true" if double else "32-true",
    )
    return replayed, averages.found
