"""Settings that are refused, and what the sentence must name. One line each: what is typed in a shell, "|", the key."""

TEXT = """
# -- another type
model.name=null | model.name
model.name=5 | model.name
model.name=[a] | model.name
model.name='' | model.name
model.checkpoint=5 | model.checkpoint
model.checkpoint='' | model.checkpoint
'model.checkpoint={a: b}' | model.checkpoint
model.weights=null | model.weights
model.weights=best | model.weights
model._target_=null | model._target_
model._target_=no.such.name | model._target_
model._target_=tinyfusion_pl.artifacts | model._target_
++model._partial_=5 | model._partial_
+model.depth=2.5 | model.depth
+model.depth=0 | model.depth
+model.depth=1000000 | model.depth
+model.hidden_size=100 | model.checkpoint
recover.fit.compile=fast | recover.fit.compile
+model.activation_checkpointing=5 | model.activation_checkpointing
+model.activation_checkpointing=1.5 | model.activation_checkpointing
+model.activation_checkpointing=half | model.activation_checkpointing
data.batch_size=2.5 | data.batch_size
data.batch_size=null | data.batch_size
data.batch_size=true | data.batch_size
data.batch_size='"8"' | data.batch_size
data.batch_size=0 | data.batch_size
data.batch_size=-1 | data.batch_size
data.batch_size=1000000000 | data.batch_size
data.num_workers=100000 | data.num_workers
data.num_workers=-1 | data.num_workers
data.seed=x | data.seed
objective.num_timesteps=1.5 | objective.num_timesteps
objective.num_timesteps=0 | objective.num_timesteps
objective.noise_schedule=square | objective.noise_schedule
objective.learn_sigma=1 | objective.learn_sigma
objective.learn_sigma=null | objective.learn_sigma
distill.pairs=[] | distill.pairs
distill.weight_kd=-1 | distill.weight_kd
distill.weight_kd=null | distill.weight_kd
distill.weight_feature=nan | distill.weight_feature
distill.weight_data=1e30 | distill.weight_data
distill.num_sigma=0 | distill.num_sigma
distill.feature_mask=round | distill.feature_mask
distill.output_loss=l1 | distill.output_loss
distill=interval distill.interval_share=0 | distill.interval_share
distill=interval distill.interval_share=1.5 | distill.interval_share
distill=interval distill.weight_interval=0 | distill.weight_interval
distill=interval distill.weight_interval=-1 | distill.weight_interval
distill=lift distill.weight_kd=0 | distill.weight_kd
distill=lift distill.group_size=1 | distill.group_size
metrics.metrics=5 | metrics.metrics
metrics.metrics=[a] | metrics.metrics
metrics.feature_network=null | metrics.feature_network
averaging.decay=1 | averaging.decay
averaging.decay=x | averaging.decay
averaging=null | averaging
logger.factory=5 | logger.factory
paths.output_dir=null | paths.output_dir
# -- the run
seed=4294967296 | seed
seed=-1 | seed
seed=1.5 | seed
seed=null | seed
seed='"0"' | seed
seed=[0] | seed
name=../x | name
name=a/b | name
name='' | name
name=null | name
name=.hidden | name
name='"a b"' | name
name=5 | name
run_dir='' | run_dir
run_dir=null | run_dir
run_dir=5 | run_dir
run_dir=[a] | run_dir
++foo.bar=1 | foo.bar
++foo=1 | foo
+evaluate.foo=1 | evaluate.foo
++data.foo=1 | data.foo
+pruning.save_dir=x | pruning.save_dir
+pruning.source=x | pruning.source
+learn_mask.module.denoiser=null | learn_mask.module.denoiser
+learn_mask.fit.trainer.max_step=5 | learn_mask.fit.trainer.max_step
+task.foo=1 | task.foo
task.name=x | task.name
task.seed=5 | task.seed
task.stages=learn_mask | task.stages
task.stages=null | task.stages
task.stages=5 | task.stages
task.stages=[] | task.stages
task.stages=[5] | task.stages
task.stages=[learn] | task.stages
task.stages=[learn_mask,learn_mask] | task.stages
task.stages=[recover,learn_mask] | task.stages
task.stages=[report,evaluate] | task.stages
# -- pruning
search.trial_steps=[-7] | trial_steps
search.num_steps=0 | num_steps
search.trials={a:1} | trials
pruning.units=[[x]] | pruning.units
pruning=learned pruning.pattern=62 | pruning.pattern
pruning=learned pruning.pattern=null | pruning.pattern
pruning=learned pruning.keep=6 | pruning.pattern
pruning=learned pruning.pattern=null pruning.keep=12 | pruning.keep
pruning=learned pruning.pattern=null pruning.keep=0 | pruning.keep
pruning=learned pruning.pattern=null pruning.keep=half | pruning.keep
pruning=learned pruning.pattern=null pruning.keep=true | pruning.keep
pruning=learned pruning.pattern=null pruning.keep=0.01 | pruning.keep
pruning=learned pruning.pattern=null pruning.keep=[1] | pruning.keep
pruning=learned pruning.pattern=null 'pruning.keep={nowhere: 3}' | pruning.keep
pruning=learned pruning.pattern=[1] | pruning.pattern
pruning=learned pruning.pattern='"1:1"' | pruning.pattern
pruning=learned pruning.pattern='"12:12"' | pruning.pattern
pruning=learned pruning.pattern='"1:99999999999"' | pruning.pattern
pruning=learned pruning.pattern='"5:4"' | pruning.pattern
pruning=learned pruning.pattern='"0:2"' | pruning.pattern
pruning=learned pruning.pattern='"1:5"' | pruning.pattern
pruning=learned pruning.pattern='{blocks: "1:1"}' | pruning.pattern
pruning=learned pruning.stacks=[denoiser.blocks,denoiser.blocks] | pruning.stacks
pruning=learned pruning.stacks=[blocks,denoiser.blocks] | pruning.stacks
pruning=learned pruning.stacks=nowhere | pruning.stacks
pruning=learned pruning.stacks=5 | pruning.stacks
pruning=learned pruning.stacks='' | pruning.stacks
pruning=learned pruning.tau_start=0 | pruning.tau_start
pruning=learned pruning.tau_start=nan | pruning.tau_start
pruning=learned pruning.tau_end=inf | pruning.tau_end
pruning=learned pruning.tau_end='"0.1"' | pruning.tau_end
pruning=learned pruning.scaling=null | pruning.scaling
pruning=learned pruning.scaling=1e30 | pruning.scaling
pruning=learned pruning.init=x | pruning.init
pruning=learned pruning.init=1e20 | pruning.init
pruning=learned pruning.average_decay=1 | pruning.average_decay
pruning=learned pruning.anneal_steps=0 | pruning.anneal_steps
pruning=learned pruning.anneal_steps=2.5 | pruning.anneal_steps
pruning=learned pruning.logits_lr=-1 | pruning.logits_lr
pruning=learned pruning.logits_lr=1e20 | pruning.logits_lr
pruning=learned pruning.max_nonfinite=0 | pruning.max_nonfinite
pruning=learned pruning.gather=nan | pruning.gather
pruning=learned pruning.gather=1 | pruning.gather
pruning=learned pruning.delta_w=keep | pruning.delta_w
pruning=learned pruning.search_loss=dense | pruning.search_loss
pruning=learned pruning.search_loss=5 | pruning.search_loss
pruning=learned pruning.relaxation=softmax | pruning.relaxation
pruning=learned pruning.straight_through=half | pruning.straight_through
pruning=learned pruning.multiplier_lr=0 | pruning.multiplier_lr
pruning=learned pruning.multiplier_lr=1e20 | pruning.multiplier_lr
pruning=learned pruning.relaxation=hard_concrete pruning.tau_start=3 | pruning.tau_start
pruning=learned pruning.relaxation=hard_concrete pruning.anneal_steps=5 | pruning.anneal_steps
pruning=learned pruning._target_=5 | pruning._target_
pruning=learned pruning._partial_=false | pruning
pruning=null | pruning
pruning=cka pruning.criterion.num_rows=3 | pruning.criterion.num_rows
pruning=cka pruning.criterion.num_rows=2.5 | pruning.criterion.num_rows
pruning=greedy pruning.criterion.healing_steps=-1 | pruning.criterion.healing_steps
pruning=greedy pruning.criterion.healing_steps=1.5 | pruning.criterion.healing_steps
pruning=greedy pruning.criterion.healing_batch_size=0 | pruning.criterion.healing_batch_size
pruning=greedy pruning.criterion.healing_lr=0 | pruning.criterion.healing_lr
pruning=greedy pruning.criterion.healing_lr=1e20 | pruning.criterion.healing_lr
pruning=diff_pruning distill=output pruning.removed=2 | pruning.removed
pruning=diff_pruning distill=output pruning.removed=0 | pruning.removed
pruning=diff_pruning distill=output pruning.removed=1 | pruning.removed
pruning=diff_pruning distill=output pruning.removed=0.9999 | pruning.removed
pruning=diff_pruning distill=output pruning.threshold=1 | pruning.threshold
pruning=diff_pruning distill=output pruning.threshold=-0.1 | pruning.threshold
pruning=diff_pruning distill=output pruning.num_intervals=0 | pruning.num_intervals
pruning=diff_pruning distill=output pruning.num_intervals=2000 | pruning.num_intervals
pruning=diff_pruning distill=output pruning.num_samples=1 | pruning.num_samples
pruning=diff_pruning distill=output pruning.batch_size=0 | pruning.batch_size
pruning=diff_pruning distill=output pruning.depth=6 | pruning.depth
pruning=diff_pruning distill=output pruning.keep=6 | pruning.keep
pruning=diff_pruning | distill
pruning=diff_pruning distill=representation | distill
pruning=ch distill=output pruning.depth.criterion=round | pruning.depth.criterion
pruning=ch distill=output pruning.depth.keep=12 | pruning.depth.keep
pruning=ch distill=output pruning.depth.keep=half | pruning.depth.keep
pruning=ch distill=output pruning.depth.pattern='"1:2"' | pruning.depth.keep
pruning=ch distill=output pruning.depth.keep=4 | pruning.removed
pruning=ch distill=output pruning.depth=null pruning.removed=0.9999 | pruning.removed
pruning=ch distill=output pruning.depth._partial_=true | pruning.depth
adapter.weight_update=half | adapter.weight_update
adapter.weight_update=5 | adapter.weight_update
adapter.weight_update.r=0 | adapter.weight_update.r
adapter.weight_update.r=2.5 | adapter.weight_update.r
adapter.weight_update.lora_alpha=nan | adapter.weight_update.lora_alpha
adapter.weight_update.lora_alpha=0 | adapter.weight_update.lora_alpha
pruning=learned +adapter.weight_update.target_modules=[nothing] | adapter.weight_update.target_modules
pruning=learned +adapter.weight_update.target_modules=5 | adapter.weight_update.target_modules
+adapter.weight_update.lora_dropout=2 | adapter.weight_update.lora_dropout
+adapter.weight_update.lora_dropout=-0.5 | adapter.weight_update.lora_dropout
# -- training
learn_mask.fit=null | learn_mask.fit
learn_mask.fit.logger=5 | learn_mask.fit.logger
learn_mask.fit.callbacks=null | learn_mask.fit.callbacks
learn_mask.fit.callbacks=[a] | learn_mask.fit.callbacks
learn_mask.fit.callbacks.progress=5 | learn_mask.fit.callbacks.progress
runtime.devices=hot | runtime.devices
runtime.devices=[] | runtime.devices
runtime.devices=0 | runtime.devices
runtime.devices=1.5 | runtime.devices
runtime.devices=100000 | runtime.devices
runtime.num_nodes=0 | runtime.num_nodes
runtime.num_nodes=2.5 | runtime.num_nodes
runtime.accelerator=abacus | runtime.accelerator
runtime.accelerator='' | runtime.accelerator
runtime.precision=64-half | runtime.precision
runtime.precision=null | runtime.precision
+runtime.device=2 | runtime.device
task=train runtime.devices=hot | runtime.devices
task=measure measure.samples=x measure.reference=y runtime.devices=hot | runtime.devices
trainer.strategy=ddp_spawn | trainer.strategy
trainer.strategy=magic | trainer.strategy
trainer.strategy='' | trainer.strategy
trainer.strategy=null | trainer.strategy
+trainer.devices=2 | trainer.devices
pruning=learned trainer=fsdp2 runtime.accelerator=cpu | adapter=full
pruning=learned adapter=full pruning.search_loss=teacher trainer=fsdp2 runtime.accelerator=cpu | pruning.search_loss=data
pruning=learned adapter=full callbacks@learn_mask.fit.callbacks=ema trainer=fsdp2 runtime.accelerator=cpu | trainer=ddp
distill=interval trainer=fsdp2 runtime.accelerator=cpu | distill=output
recover.replace=linear trainer=fsdp2 runtime.accelerator=cpu | recover.replace=null
callbacks@recover.fit.callbacks=evaluation trainer=fsdp2 runtime.accelerator=cpu | recover.fit.callbacks.evaluation=null
recover.fit.compile=true trainer=fsdp2 runtime.accelerator=cpu | recover.fit.compile
trainer=fsdp2 runtime.precision=64-true runtime.accelerator=cpu | runtime.precision
learn_mask.fit.trainer=null | learn_mask.fit.trainer
learn_mask.fit.trainer.max_steps=0 | learn_mask.fit.trainer.max_steps
learn_mask.fit.trainer.max_steps=2.5 | learn_mask.fit.trainer.max_steps
learn_mask.fit.trainer.max_steps=null | learn_mask.fit.trainer.max_steps
learn_mask.fit.trainer.max_steps=1e30 | learn_mask.fit.trainer.max_steps
learn_mask.fit.trainer.max_epochs=3 | learn_mask.fit.trainer.max_epochs
learn_mask.fit.trainer.devices=hot | learn_mask.fit.trainer.devices
learn_mask.fit.trainer.devices=[] | learn_mask.fit.trainer.devices
learn_mask.fit.trainer.devices=[1] | learn_mask.fit.trainer.devices
learn_mask.fit.trainer.devices=0 | learn_mask.fit.trainer.devices
learn_mask.fit.trainer.devices=100000 | learn_mask.fit.trainer.devices
learn_mask.fit.trainer.accelerator=abacus | learn_mask.fit.trainer.accelerator
learn_mask.fit.trainer.precision=64-half | learn_mask.fit.trainer.precision
learn_mask.fit.trainer.gradient_clip_val=-1 | learn_mask.fit.trainer.gradient_clip_val
learn_mask.fit.trainer.accumulate_grad_batches=0 | learn_mask.fit.trainer.accumulate_grad_batches
learn_mask.fit.trainer.log_every_n_steps=-1 | learn_mask.fit.trainer.log_every_n_steps
learn_mask.fit.trainer.strategy=ddp_spawn | learn_mask.fit.trainer.strategy
learn_mask.fit.trainer.strategy=magic | learn_mask.fit.trainer.strategy
+learn_mask.fit.trainer.overfit_batches=2 | learn_mask.fit.trainer.overfit_batches
+learn_mask.fit.trainer.overfit_batches=0.5 | learn_mask.fit.trainer.overfit_batches
+learn_mask.fit.trainer.enable_checkpointing=false | learn_mask.fit.trainer.enable_checkpointing
+learn_mask.fit.trainer.limit_train_batches=0 | learn_mask.fit.trainer.limit_train_batches
+learn_mask.fit.trainer.limit_train_batches=0.0 | learn_mask.fit.trainer.limit_train_batches
+learn_mask.fit.trainer.fast_dev_run=true | learn_mask.fit.trainer.fast_dev_run
+learn_mask.fit.trainer.fast_dev_run=3 | learn_mask.fit.trainer.fast_dev_run
+learn_mask.fit.trainer.max_time=soon | learn_mask.fit.trainer.max_time
+learn_mask.fit.trainer.max_time=00:00:00:00 | learn_mask.fit.trainer.max_time
+learn_mask.fit.trainer.default_root_dir=x | learn_mask.fit.trainer.default_root_dir
+learn_mask.fit.trainer.logger=true | learn_mask.fit.trainer.logger
learn_mask.fit.checkpoint_every_n_steps=0 | learn_mask.fit.checkpoint_every_n_steps
learn_mask.fit.budget=5 | learn_mask.fit.budget
learn_mask.module.optimizer.lr=-1 | learn_mask.module.optimizer.lr
learn_mask.module.optimizer.lr=x | learn_mask.module.optimizer.lr
learn_mask.module.optimizer.lr=1e20 | learn_mask.module.optimizer.lr
+learn_mask.module.optimizer.betas=[0.9] | learn_mask.module.optimizer.betas
+learn_mask.module.optimizer.momentum=0.9 | learn_mask.module.optimizer.momentum
learn_mask.module.optimizer=5 | learn_mask.module.optimizer
recover.fit.trainer.max_steps=2.5 | recover.fit.trainer.max_steps
+recover.fit.trainer.overfit_batches=2 | recover.fit.trainer.overfit_batches
+recover.fit.trainer.enable_checkpointing=false | recover.fit.trainer.enable_checkpointing
+recover.fit.trainer.limit_train_batches=0 | recover.fit.trainer.limit_train_batches
+recover.fit.trainer.fast_dev_run=true | recover.fit.trainer.fast_dev_run
recover.module=null | recover.module
recover.module.distillation=5 | recover.module.distillation
recover.module.label_dropout=2 | recover.module.label_dropout
recover.module.scheduler=5 | recover.module.scheduler
recover.module.scheduler.num_warmup_steps=2.5 | recover.module.scheduler.num_warmup_steps
recover.module.scheduler.final_ratio=3 | recover.module.scheduler.final_ratio
recover.fit.callbacks.ema.decay=1 | recover.fit.callbacks.ema.decay
recover.fit.callbacks.ema.decay=null | recover.fit.callbacks.ema.decay
recover.fit.callbacks.ema=null | recover.weights
~recover.fit.callbacks.ema | recover.weights
recover.replace=quadratic | recover.replace
recover.replace=true | recover.replace
recover.replace=linear recover.num_replace_samples=0 | recover.num_replace_samples
recover.weights=best | recover.weights
callbacks@recover.fit.callbacks=default recover.weights=ema | recover.weights
# -- evaluation
evaluate=null | evaluate
evaluate.num_samples=1 | evaluate.num_samples
evaluate.num_samples=2.5 | evaluate.num_samples
evaluate.num_samples=5 | evaluate.num_shown
evaluate.num_samples='"50"' | evaluate.num_samples
evaluate.batch_size=0 | evaluate.batch_size
evaluate.num_timing_rounds=nan | evaluate.num_timing_rounds
evaluate.num_shown=-1 | evaluate.num_shown
evaluate.labels=hot | evaluate.labels
evaluate.precision=double | evaluate.precision
evaluate.compile=5 | evaluate.compile
evaluate.write_npz=null | evaluate.write_npz
evaluate.reference=no_such_file.npz | evaluate.reference
evaluate.reference=5 | evaluate.reference
evaluate.models=5 | evaluate.models
+evaluate.models.mine=5 | evaluate.models.mine
+evaluate.models.mine=no_such_file.pt | evaluate.models.mine
+evaluate.models.labels=a.pt | evaluate.models.labels
+evaluate.models.protocol=a.pt | evaluate.models.protocol
+evaluate.models.seconds=a.pt | evaluate.models.seconds
+evaluate.models.name=a.pt | evaluate.models.name
+evaluate.models.reference=a.pt | evaluate.models.reference
+evaluate.models.teacher=a.pt | evaluate.models.teacher
+evaluate.models.speedup=a.pt | evaluate.models.speedup
+evaluate.models.a-b=a.pt | evaluate.models.a-b
evaluate.sampling=null | evaluate.sampling
evaluate.sampling=[a] | evaluate.sampling
evaluate.sampling.guidance_scale=nan | evaluate.sampling.guidance_scale
evaluate.sampling.guidance_scale=-3 | evaluate.sampling.guidance_scale
evaluate.sampling.guidance_scale=null | evaluate.sampling.guidance_scale
evaluate.sampling.guidance_scale='"1.5"' | evaluate.sampling.guidance_scale
evaluate.sampling.guidance_channels=99 | evaluate.sampling.guidance_channels
evaluate.sampling.num_sampling_steps=2.5 | evaluate.sampling.num_sampling_steps
evaluate.sampling.num_sampling_steps=1001 | evaluate.sampling.num_sampling_steps
evaluate.sampling.sampler=euler | evaluate.sampling.sampler
+evaluate.sampling.eta=2 | evaluate.sampling.eta
+evaluate.sampling.steps=5 | evaluate.sampling.steps
sampler@evaluate.sampling=mar | evaluate.sampling
sampler@evaluate.sampling=sit_sde | evaluate.sampling
sampler@evaluate.sampling=dpm_solver evaluate.sampling.scheduler.solver_order=99 | evaluate.sampling.scheduler.solver_order
sampler@evaluate.sampling=unipc evaluate.sampling.scheduler.solver_order=0 | evaluate.sampling.scheduler.solver_order
sampler@evaluate.sampling=unipc evaluate.sampling.scheduler=null | evaluate.sampling
evaluate.trainer=null | evaluate.trainer
evaluate.trainer.devices=hot | evaluate.trainer.devices
evaluate.trainer.devices=[1] | evaluate.trainer.devices
evaluate.trainer.logger=true | evaluate.trainer.logger
+evaluate.trainer.fast_dev_run=true | evaluate.trainer.fast_dev_run
+evaluate.trainer.limit_test_batches=0 | evaluate.trainer.limit_test_batches
+evaluate.trainer.strategy=ddp_spawn | evaluate.trainer.strategy
evaluate.trainer.callbacks=5 | evaluate.trainer.callbacks
evaluate.trainer.callbacks=[5] | evaluate.trainer.callbacks
# -- other tasks
task=train train.fit.trainer.devices=hot | train.fit.trainer.devices
task=train train.fit.trainer.accelerator=abacus | train.fit.trainer.accelerator
task=train train.fit.trainer.max_steps=-1 | train.fit.trainer.max_steps
task=train train.weights=best | train.weights
task=train train.fit.callbacks.ema=null | train.weights
task=train model.name=hot | model.name
task=measure measure.samples=null measure.reference=x | measure.samples
task=measure measure.samples=5 measure.reference=x | measure.samples
task=measure measure.samples=no_such_folder measure.reference=x | measure.samples
task=measure measure.files.image_size=100000 | measure.files.image_size
task=measure measure.files.max_pixels=0 | measure.files.max_pixels
task=measure measure.samples=x measure.reference=y measure.trainer.devices=hot | measure.trainer.devices
task=measure | measure.samples
task=reference reference.output=null reference.images=x | reference.output
task=reference reference.output=x.png reference.images=x | reference.output
task=reference reference.images=x reference.output=x.npz reference.trainer.accelerator=abacus | reference.trainer.accelerator
task=extract_latents extract.images=x extract.output=y extract.vae.slicing=5 | extract.vae.slicing
task=extract_latents extract.images=x extract.output=y extract.image_size=100000 | extract.image_size
task=extract_latents extract.images=x extract.output=y extract.num_images=0 | extract.num_images
task=extract_latents extract.images=x extract.output=y extract.vae=null | extract.vae
task=extract_latents extract.images=x extract.output=y extract.vae.scaling_factor=-1 | extract.vae.scaling_factor
task=extract_latents extract.output=y | extract.images
# -- groups
data=imagenet_latents data.root=5 | data.root
data=imagenet_latents data.vae=5 | data.vae
metrics=timm | metrics.feature_network.model_name
metrics=timm metrics.feature_network.model_name=5 | metrics.feature_network.model_name
metrics=inception metrics.metrics.fid=5 | metrics.metrics.fid
task=train +model.depth=6 | model.depth
metrics=inception metrics.metrics.fid.num_features=2.5 | metrics.metrics.fid.num_features
metrics=inception metrics.metrics.precision_recall.k=0 | metrics.metrics.precision_recall.k
metrics=kid metrics.metrics.kid.num_subsets=x | metrics.metrics.kid.num_subsets
objective=sit objective.path=5 | objective.path
objective=mar objective.num_noised=0 | objective.num_noised
logger=wandb logger.factory.offline=5 | logger.factory.offline
logger=wandb logger.factory.log_models=1 | logger.factory.log_models
logger=wandb logger.factory.entity=5 | logger.factory.entity
logger=wandb logger.factory.tags=a | logger.factory.tags
logger=wandb logger.factory.tags=[5] | logger.factory.tags
logger=wandb logger.factory.project=null | logger.factory.project
logger=wandb +logger.factory.id=a | logger.factory.id
logger=tensorboard +logger.factory.project=a | logger.factory.project
callbacks@recover.fit.callbacks=evaluation recover.fit.callbacks.evaluation.every_n_steps=0 | recover.fit.callbacks.evaluation.every_n_steps
callbacks@recover.fit.callbacks=evaluation recover.fit.callbacks.evaluation.num_samples=1 | recover.fit.callbacks.evaluation.num_samples
+budget@recover.fit.budget=dit_100k recover.fit.budget.num_images=2.5 | recover.fit.budget.num_images
+budget@recover.fit.budget=dit_100k recover.fit.budget.global_batch_size=0 | recover.fit.budget.global_batch_size
"""

BAD = [
    tuple(part.strip() for part in line.rsplit("|", 1))
    for line in TEXT.strip().splitlines()
    if line and line[0] != "#"
]
