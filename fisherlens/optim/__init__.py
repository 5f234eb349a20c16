"""Natural-gradient optimizers: each a ``torch.optim.Optimizer`` for the ordinary training loop.

``loss = loss_fn(model(x), y); opt.zero_grad(); loss.backward(); opt.step()`` is all that a user writes. What holds for every method:

- *An example* is one entry of the first axis, for every layer. Its gradient g_n is that of its own loss: the user's loss is
  their mean, or their sum with ``reduction="sum"``. For ``CrossEntropyLoss`` that is the negative log-likelihood; for
  ``MSELoss``, which also averages over elements, the squared error over the number of elements. Class weights and ignored
  labels scale an example's share of the mean; positions of a structured output belong to one example.
- *Statistics* come from hooks on the Linear and convolution layers during the user's own passes. A backward pass counts if it adds to
  ``.grad``: evaluation, ``torch.autograd.grad`` and analyses of the same model in between change nothing. Several backward passes
  before a step are one batch of all their examples; divide each loss by their number, as usual, and the step is that of the
  whole batch. A module called twice in one forward pass of the model has its scores summed; two forward passes are different examples.
  ``opt.zero_grad()`` drops the statistics of the gradients that it drops (``model.zero_grad()`` cannot).
- *Sampled labels* cost one more backward pass, within each forward pass of the whole model that is due to be counted. They give the
  Fisher's own scale, Σ u uᵀ / W over the W terms of the mean, whatever the loss.
- *Training mode* is accepted: dropout is as it was in the forward pass, and the batch statistics of BatchNorm count as constants in the
  gradients of the examples.
- *Mean gradients*: MBF, TNT and Shampoo look at the mean gradient of the batch alone, whose outer product is M times smaller than that
  of the scores of M examples; so are the damping (of TNT: a root of it) and the learning rate that belong to it. ``warm_start(batches)`` of MBF and
  TNT fills their averages before the first step.
- *Periods*: statistics are taken in every ``refresh`` steps, and inverses, roots or bases made of them every ``inverse_refresh`` steps.
- *Parameters without statistics* (embeddings, recurrent layers, tensors of one's own modules, tied between modules, or used past their
  module as the first forward pass shows) move along ḡ / (1 + damping), announced once by a NumericalWarning; a method whose source has another
  rule (TENGraD: ḡ) follows that. Parameters that did not require grad when the optimizer was built are not moved, which is said once if they have a
  gradient later.
- *Parameter groups*: ``param_groups=[{"params": ["0.*", "head"], "lr": 0.1}, …]`` gives some parameters options of their own. ``"params"`` are
  names, layers or glob patterns, or the parameters themselves; options are ``lr``, ``weight_decay``, ``damping``, ``momentum``, ``kl_clip`` and the
  method's ``ema``. All other parameters are the last group, with the arguments of the constructor. Within a layer only ``lr`` and ``weight_decay``
  may differ (no decay of biases, say), as a layer is treated as a whole; with blocks that cross layers (NGD, some partitions of CWNGD) ``damping``
  and averages must be the same everywhere. Layers of one ``kl_clip`` share one ν, so that groups with equal options are as one group.
- *Mixed precision*: under ``torch.autocast`` parameters, statistics and directions stay in the dtype of the parameters. With a
  ``torch.amp.GradScaler`` (``scaler.scale(loss).backward()``, ``scaler.unscale_(opt)`` or not, ``scaler.step(opt)``, ``scaler.update()``)
  scores of true labels are freed of its scale; sampled labels have backward passes of their own, without one. A step
  with an overflowing gradient is skipped: its statistics are dropped, nothing changes, and ``opt.diagnostics["overflows"]`` counts it.
- *Failures*: a gradient with NaN or infinity is refused with the name of its parameter, parameters and state unchanged. A block that is
  not positive definite is tried again with 10, 100, …, 10⁶ times the damping, then takes gradient over damping, counted in ``opt.diagnostics``.
- *The model* can be copied and pickled, and its copies feed nothing here. ``opt.remove_hooks()`` takes the hooks off, and they go with
  the optimizer. ``opt.state_dict()`` resumes bit by bit. ``torch.compile`` is fine.
  Inputs of layers that an optimizer still needs must not be written over before the step: that is noticed, and an InputError.
  Processes that train one model together are not coordinated: each would keep the statistics of its own examples.
"""

from fisherlens.optim.cwngd import CWNGD
from fisherlens.optim.ekfac import EKFAC
from fisherlens.optim.fngd import FNGD
from fisherlens.optim.kbfgs import KBFGS
from fisherlens.optim.kfac import KFAC
from fisherlens.optim.mbf import MBF
from fisherlens.optim.ngd import NGD
from fisherlens.optim.projected_kfac import ProjectedKFAC
from fisherlens.optim.quasidiagonal import QuasiDiagonal
from fisherlens.optim.shampoo import Shampoo
from fisherlens.optim.tengrad import TENGraD
from fisherlens.optim.tnt import TNT
from fisherlens.optim.unitwise import UnitWise

__all__ = [
    "CWNGD",
    "EKFAC",
    "FNGD",
    "KBFGS",
    "KFAC",
    "MBF",
    "NGD",
    "TNT",
    "ProjectedKFAC",
    "QuasiDiagonal",
    "Shampoo",
    "TENGraD",
    "UnitWise",
]
