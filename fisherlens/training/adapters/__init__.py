"""A Monitor inside other people's training loops, and its numbers in their logs.

Loggers go into ``fl.Monitor(..., to=[...])``; any function ``(step, values)`` may stand in their place. Callbacks build a Monitor of
their own and step it. Each needs its library when it is made, not before; fisherlens installs none of them.
"""

from fisherlens.training.adapters.lightning import lightning_callback
from fisherlens.training.adapters.loggers import mlflow, tensorboard, wandb
from fisherlens.training.adapters.transformers import transformers_callback

__all__ = ["lightning_callback", "mlflow", "tensorboard", "transformers_callback", "wandb"]
