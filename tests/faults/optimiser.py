"""Clipping, AdamW and its learning rate."""

from faults.checks import ONE
from faults.fault import Fault

STEP, FILE = "accessory/train/step.py", "accessory/train/optim.py"
SCHEDULE = "tests/test_schedule.py::test_learning_rates"

FAULTS = (
    Fault(
        "nothing keeps the clip coefficient from dividing by zero",
        STEP,
        "(clip_grad / (norm + 1e-6))",
        "(clip_grad / norm)",
        ONE,
    ),
    Fault(
        "a gradient below the limit is scaled up to it",
        STEP,
        "(clip_grad / (norm + 1e-6)).clamp(max=1.0)",
        "clip_grad / (norm + 1e-6)",
        "tests/test_balance.py::test_the_weight_means_what_it_says[document]",
    ),
    Fault(
        "gradients are clipped value by value",
        STEP,
        "    torch._foreach_mul_([local_part(p.grad) for p in model.parameters() if p.grad is not None], scale)\n",
        "    for gradient in [local_part(p.grad) for p in model.parameters() if p.grad is not None]:\n"
        "        gradient.clamp_(-clip_grad, clip_grad)\n",
        ONE,
    ),
    Fault(
        "vectors are not clipped",
        STEP,
        "if p.grad is not None], scale)",
        "if p.grad is not None and p.dim() > 1], scale)",
        ONE,
    ),
    Fault("norms decay", FILE, '"weight_decay": 0.0', '"weight_decay": config.weight_decay', ONE),
    Fault("nothing decays", FILE, '"weight_decay": config.weight_decay', '"weight_decay": 0.0', ONE),
    Fault("the betas have changed places", FILE, "betas=config.betas", "betas=config.betas[::-1]", ONE),
    Fault("epsilon is AdamW's own", FILE, ", eps=config.eps", "", ONE),
    Fault(
        "gradients add up over the steps",
        STEP,
        "    optimizer.zero_grad(set_to_none=True)\n",
        "",
        ONE,
    ),
    Fault(
        "only matrices have the schedule's learning rate",
        "accessory/train/loop.py",
        "for group in built.optimizer.param_groups:",
        "for group in built.optimizer.param_groups[:1]:",
        "'tests/test_oracle.py::test_steps_of_the_command[expert]'",
    ),
    Fault("there is no warm-up", FILE, "if step.before.rows < warmup:", "if step.before.rows < 0:", SCHEDULE),
    Fault("the warm-up is a step late", FILE, "step.after.rows / warmup", "step.before.rows / warmup", SCHEDULE),
    Fault(
        "the cosine begins where the run does",
        FILE,
        "progress = (step.before.rows - warmup) /",
        "progress = step.before.rows /",
        SCHEDULE,
    ),
    Fault(
        "the cosine ends at zero, not at min_lr",
        FILE,
        "config.min_lr + (config.lr - config.min_lr) * 0.5",
        "config.lr * 0.5",
        SCHEDULE,
    ),
    Fault(
        "the warm-up is a share of the whole run, not of an epoch",
        FILE,
        "config.warmup_epochs * plan.epoch_rows[0]",
        "config.warmup_epochs * total",
        SCHEDULE,
    ),
    Fault(
        "a resumed run's cosine begins anew",
        FILE,
        "progress = (step.before.rows - warmup) /",
        "progress = (step.before.rows - max(warmup, plan.done.rows)) /",
        SCHEDULE,
    ),
    Fault(
        "what a step on a CPU frees is given back",
        "accessory/train/loop.py",
        "            keep_freed_memory()\n",
        "            pass\n",
        "tests/test_run_state.py::test_memory_that_is_freed_serves_again",
    ),
)
