"""What the optimizers say when they refuse, warn or fall back."""

NO_PARAMETERS = (
    "{name} needs a model with parameters that require grad; {model} has none. "
    "Call requires_grad_(True) on the parameters to train."
)
NOTHING_COVERED = (
    "{name} preconditions Linear and convolution layers (by exact type); {model} has no trainable one. "
    "For such a model take a method of torch.optim."
)
MIXED = (
    "The trainable parameters must share one device and one dtype, float32 or float64; got {got}. Use model.float() or "
    "model.double(); mixed precision by autocast leaves the parameters in float32."
)
FALLBACK = (
    "{name} does not precondition {names}, as no layer of a known kind owns them alone; they move by "
    "lr * {rule}, the rule for parameters without statistics. Freeze them to leave them as they are."
)
UNSEEN = (
    "{name} saw a gradient of {names}, but no call of the module that owns them, as when a function uses its weight "
    "directly; they move by lr * {rule}. Call the module itself, model.layer(x), to have them preconditioned."
)
STILL = (
    "{name} found no gradient of {names} while the rest of the layer has one, as after requires_grad_(False); they stay as they are, but "
    "still count in the block of their layer. Build a new optimizer to leave them out of it."
)
NO_STATISTICS = (
    "step() found no statistics: no backward pass has reached the model's layers since the last step (or since "
    "zero_grad, which drops them). The loop is loss = loss_fn(model(x), y); opt.zero_grad(); loss.backward(); opt.step(). "
    "The model must be the one that the optimizer was built with, its hooks in place; a loss that was backpropagated by "
    "torch.autograd.grad leaves no .grad and does not count."
)
BAD_GRADIENT = (
    "The gradient of parameter {name!r} holds NaN or infinity, so the step was refused: parameters and state are as "
    "before. The loss has probably diverged or divided by zero; lower lr, raise damping, or skip this batch."
)
BAD_STATISTICS = (
    "The scores of layer {layer!r} hold NaN or infinity in their second moments although the gradient is finite, so the "
    "step was refused: parameters and state are as before. Squares probably overflowed; rescale the loss or the inputs, or "
    "use float64."
)
BAD_STEP = (
    "The step along parameter {name!r} is not finite, so it was refused: the parameters are as before. Gradient over damping "
    "overflows; raise damping, or rescale the loss."
)
MOVED = (
    "The optimizer's state is {was}, but the model's parameters are {now}: the model was moved or converted after the first "
    "step. Move it before, or build a new optimizer."
)
OTHER_STATE = "This state dict is of {got}; {name} loads only its own. Build the same optimizer as when it was saved, or start without it."
OTHER_MODEL = (
    "This state of {name} belongs to another model or setting: {what}. Build the optimizer with the same model, trainable "
    "parameters and options as when it was saved."
)
HIDDEN_SCALE = (
    "{name} was stepped by a scaler that has unscaled the gradients before and does not tell its scale, which the captured scores still "
    "carry. Step by scaler.step(opt) of a torch.amp.GradScaler, or leave scaler.unscale_(opt) out."
)
SCALED_CLOSURE = (
    "{name} got a closure from a GradScaler, whose scale the gradients of that closure would carry, unchecked. Call backward on "
    "scaler.scale(loss) first, then scaler.step(opt) without a closure; a method that needs one cannot be used with a scaler."
)
NO_MORE_GROUPS = (
    "{name} takes its parameter groups when it is built, as statistics are laid out then: {name}(model, param_groups=[{{'params': "
    "['0.*'], 'lr': 0.1}}]); what is in none of them is the last group. Options of a group may change at any time, as in "
    "opt.param_groups[0]['lr'] = 0.01; for parameters that are to be trained from now on, build a new optimizer."
)
BAD_GROUPS = (
    "param_groups must be a list of dicts such as {{'params': ['0.*', 'head'], 'lr': 0.1}}, with the names, layers or glob patterns of "
    "parameters, or the parameters themselves; got {got}."
)
BAD_PARAMS = (
    "'params' of parameter group {number} must be names, layers or glob patterns, or parameters of the model; got {got}. For example "
    "['features.*', 'head.weight'], or model.head.parameters()."
)
NOT_OWN = (
    "Parameter group {number} holds a tensor of shape {shape} that is no parameter of the model that {name} was given, as after a copy of "
    "the model. Take it from that model, or name it: 'params': ['head.weight']."
)
EMPTY_GROUP = (
    "Parameter group {number} holds no trainable parameter; its 'params' are {got}. An iterator such as model.parameters() can be used "
    "once only, and what does not require grad is in no group. Leave the group out, or set requires_grad before."
)
TWO_GROUPS = (
    "Parameter {parameter!r} is in parameter groups {first} and {second}, but can have one set of options. Take it out of one of them, as "
    "by a narrower pattern."
)
IN_GROUP = "In parameter group {number}: {error}"
SPLIT_LAYER = (
    "Layer {layer!r} is divided between parameter groups {groups} with different {option} {values}, but {name} treats a layer as a whole. "
    "Give these groups the same {option}, or put the layer into one of them; lr and weight_decay may differ within a layer."
)
COUPLED_LAYERS = (
    "Blocks of {name} reach over several layers here, so that {option} must be the same in all parameter groups; got {values}. Groups "
    "may differ in lr, weight_decay, momentum and kl_clip; a method with blocks within layers, such as TENGraD, allows the rest."
)
NO_COPY = (
    "{name} cannot be copied or pickled, because its statistics come from hooks on its own model. Save opt.state_dict(), and "
    "load it into a new {name} of the other model."
)
NOT_A_MODEL = "{name} takes the model itself, a torch.nn.Module, to put hooks on; got {got}."
LAZY = "Parameters {names} are not initialised yet. Run one forward pass before building {name}."
WEIGHTED_LABELS = (
    "labels='sampled' cannot use {likelihood!r}: its weights follow the observed labels, which the optimizer does not see. "
    "Use labels='true', or the likelihood without weights."
)
NOT_THE_MODEL = (
    "labels='sampled' draws labels from the outputs of the model that the optimizer was built with; a layer was "
    "backpropagated without a call of that model since the last step, or from within a reentrant checkpoint. Call the whole model, "
    "checkpoint with use_reentrant=False, or use labels='true'."
)
NOT_DEFINITE = (
    "{count} blocks of {size} parameters are not positive definite even with {damping:g} I added; they move along gradient / "
    "{damping:g}. Training has probably diverged: lower lr or raise damping."
)
NOT_BATCHED = (
    "Layer {layer!r} ({type}) must read a batch, of {wanted} axes with the examples on the first; got an input of shape "
    "{got}. A single example has no batch axis: add one, with x.unsqueeze(0)."
)
OTHER_COUNT = (
    "All layers of one forward pass must see the same examples on their first axis; got {counts}. A reshape probably folds "
    "another axis into the batch, so that rows can no longer be told apart by example: keep that axis apart (a Linear takes "
    "any number of axes between), or set requires_grad_(False) on the parameters of such layers."
)
WRITTEN_OVER = (
    "The input of layer {layer!r} was changed in place after the layer had read it, so its scores cannot be computed. "
    "Replace the in-place operation that follows, such as ReLU(inplace=True) or +=, by the ordinary one."
)
NO_TENSOR = (
    "labels='sampled' draws labels from the model's outputs, which must be one tensor of logits or means; the model "
    "returned {got}. Use labels='true', or a model whose forward returns the outputs alone."
)
WARM_TOO_LATE = "{name}.warm_start() replaces all averages, so it comes before the first step; this optimizer has made steps. Build a new one."
MODEL_GONE = "{name} cannot run its model for a warm start, because the model no longer exists. Keep a reference to it."
WEIGHTED_WARM = (
    "A warm start draws labels, which {likelihood!r} does not allow: its weights follow the observed labels. Start without it, or use "
    "the likelihood without weights."
)
NO_CLOSURE = (
    "{name}.step() needs a closure here, because it looks at the same batch again after the step, and cannot do so by itself: the loss is "
    "no mean of an unweighted categorical, Bernoulli or Gaussian likelihood, or came from a part of the model. Use opt.step(closure), "
    "where closure() calls opt.zero_grad(), computes the loss, calls loss.backward() and returns the loss."
)
NEEDS_CLOSURE = (
    "{name} with adapt_damping=True compares the loss before and after a step, so it needs step(closure); got step(). Put "
    "zero_grad, loss and backward into a function that returns the loss, or set adapt_damping=False."
)
TRUE_LABELS = (
    "{name} weights the gradients of the loss itself, so its coefficients exist for labels='true' only; got 'sampled'. For "
    "sampled labels take TENGraD, which has the same layer blocks."
)
LOSS_LABELS = (
    "{name} follows the change of the loss itself from the old to the new weights, so labels must be 'true'; got 'sampled'. For "
    "sampled labels take KFAC, whose factors it replaces."
)

# Why a number may have gone wrong and what to do, after what was expected and what came.
HINTS = {
    "lr": " A schedule has probably run below zero, or another argument stands in its place; begin with the method's default, and end a schedule at 0.",
    "damping": (
        " It is added to the method's matrix, which has no inverse without it; begin with the method's default, and make it smaller by factors of ten "
        "while steps stay stable."
    ),
    "weight_decay": " It pulls parameters towards 0, and 0 leaves it out; a negative one would push them away.",
    "kl_clip": " None clips nothing.",
    "momentum": " It is the share of the last direction that is added to the next one; 0 leaves it out.",
    "ema": " It is the share of the old statistics that is kept; 0 averages nothing.",
    "momentum_ema": " It is the share of the old mean gradient that is kept; 0 averages nothing.",
}
THAWED = (
    "{name} does not move {names}: they did not require grad when it was built, and have a gradient now. Its statistics are laid out once, so "
    "build a new optimizer to train them, with the new state of the model; if another optimizer moves them, all is well."
)
PAST = (
    "{name} saw {names} used past the module that owns them as well as through it, as where a decoder multiplies by the weight of its encoder. The calls "
    "of the module do not explain such gradients; they move by lr * {rule}. Give the second use a module with parameters of its own to have "
    "both preconditioned."
)
OLD_STATE = (
    "This state of {name} has another layout: {what}. It was probably saved by another version of fisherlens, or edited. Resume with the version that "
    "saved it, or load the model alone and begin with a new optimizer: its averages are made anew within some steps."
)
OTHER_BLOCKS = (
    "This state of {name} was saved with other blocks of the same sizes than those of partition {scheme!r} here, as with another seed or other input "
    "maps. Build the optimizer with the partition that it was saved with, or start without the state."
)
