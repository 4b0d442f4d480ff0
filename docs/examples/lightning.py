"""Pretrain with your own Trainer: python docs/examples/lightning.py mae/digits shards/train shards/val"""

import sys

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

import sslvit

recipe, train, val = sys.argv[1:4]
settings = sslvit.load_recipe(recipe, {"data.shards": train, "train.epochs": 2, "data.workers": 0})
data = sslvit.ShardDataModule.from_settings(settings, val)
task = sslvit.make_task(settings, data.run)
best = ModelCheckpoint(monitor="val/loss")
trainer = pl.Trainer(
    max_epochs=2,
    accumulate_grad_batches=data.run.accumulation_steps,
    callbacks=[best, EarlyStopping("val/loss"), LearningRateMonitor()],
    logger=[TensorBoardLogger("runs"), WandbLogger(save_dir="runs", offline=True)],
)
trainer.fit(task, data)
task = type(task).load_from_checkpoint(best.best_model_path)
sslvit.save_encoder(task.trained_encoder, "runs/encoder")
