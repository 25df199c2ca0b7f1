"""The verbs that train."""

from accessory.config import Positive
from accessory.verbs.options import (
    Verbs,
    a_count,
    a_path,
    add_verb,
    checked,
    function_of,
)


def training_verbs(verbs: Verbs) -> None:
    start = "Start it with torchrun or srun, a process for each GPU, or plainly for a single one."
    writes = (
        "It writes the run directory OUT: the model (accessory convert gives it any format), states to resume from, "
        "metrics.jsonl, report.png. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP end it after the step at hand, with a state to go "
        "on from."
    )
    finetune = add_verb(
        verbs,
        "finetune",
        function_of("accessory.train.loop", "run_finetune"),
        "train a model as a run's YAML file says (with torchrun, srun, or plain)",
        "Train a model, all of it or LoRA, biases, norms or chosen parts, on a mix of conversations, instructions and "
        "texts. It needs a run file, which names the checkpoint to start from and the data mix; accessory config lists what "
        f"else can stand in it. {start} {writes}",
        "accessory finetune configs/finetune/quickstart.yaml parallel.model_parallel=1",
        "torchrun --nproc-per-node 2 -m accessory finetune configs/finetune/quickstart.yaml",
        "accessory finetune RUN.yaml resume=auto model.layout=mixtral_sparse",
        "accessory finetune RUN.yaml --dry-run --world 32 --memory 80",
    )
    pretrain = add_verb(
        verbs,
        "pretrain",
        function_of("accessory.train.loop", "run_pretrain"),
        "the same with packing on: for texts, from random weights or a checkpoint",
        "Train on texts, cut to data.max_seq_len and packed into whole rows, from random weights or a checkpoint. It is "
        f"finetune with data.packing=true. {start} {writes}",
        "accessory pretrain configs/pretrain/tiny.yaml data.mix=MIX.yaml model.tokenizer=tokenizer.model",
    )
    for verb in (finetune, pretrain):
        verb.add_argument("config", type=a_path, help="run YAML, e.g. configs/finetune/quickstart.yaml")
        verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a setting of the file")
        about = "check all that a run would stumble over, say what it takes and writes, show its first batch, and end"
        verb.add_argument("--dry-run", action="store_true", help=about)
        verb.add_argument("--world", type=a_count, help="of a dry run: plan for so many processes; default: those started")
        about = "of a dry run: memory of each process's GPU; default: this machine's, unless --world is another"
        verb.add_argument("--memory", type=checked(Positive), metavar="GIB", help=about)
    _before_a_run(verbs)


def _before_a_run(verbs: Verbs) -> None:
    """Add the verbs to use before a run: ``plan``, ``doctor`` and ``config``."""
    verb = add_verb(
        verbs,
        "plan",
        function_of("accessory.train.planner", "run_plan"),
        "how to train a model on which GPUs: what fits, what a step takes, the settings; needs no GPU",
        "Trace the real training step of a rank, at full size on shapes alone, for every way to cut it over so many GPUs; "
        "print what fits, the seconds of a step by estimate, and the settings of the best three. Memory and traffic are "
        "counted, times are estimated from the card's data sheet, or from what --measure finds on this machine.",
        "accessory plan configs/model/mixtral-8x7b.json --gpus 32 --card a100-80",
        "accessory plan CKPT_DIR --gpus 1 --card h200 --tuning lora --rows 4",
        "accessory plan configs/model/mixtral-8x7b.json --card t4 --tuning none",
    )
    verb.add_argument("model", type=a_path, help="config.json, or the directory of a checkpoint")
    verb.add_argument("--gpus", type=a_count, default=1, help="default: %(default)s")
    verb.add_argument("--card", help="a100-80, h100, h200, b200, rtx-4090, ...")
    verb.add_argument("--per-node", type=a_count, default=8, help="GPUs of a node; default: %(default)s")
    verb.add_argument(
        "--tuning",
        choices=["full", "lora", "qlora", "none"],
        default="full",
        help="what trains; none: the model answers, with experts offloaded where they do not fit; default: %(default)s",
    )
    verb.add_argument("--seq-len", type=a_count, help="tokens of a row; default: 4096, or as many as the model was made for")
    verb.add_argument("--rows", type=a_count, help="rows of a step, over all GPUs; default: 128, or one for each GPU")
    verb.add_argument("--measure", action="store_true", help="take what this machine's device reaches")

    verb = add_verb(
        verbs,
        "doctor",
        function_of("accessory.train.doctor", "run_doctor"),
        "whether a run can start here: devices, ranks that hear one another, shared files, disk, clocks",
        "Look at what a run needs of this machine and of the others, alone or with torchrun or srun as a run is started: "
        "versions, devices, a sum over all ranks, files that all see, free disk, clocks. With a run file it looks at the "
        "directory of that run, and whether the next save fits. It prints a line each and leaves nothing behind. Exit "
        "code 1 if something is wrong.",
        "accessory doctor",
        "srun -n32 --gres=gpu:8 --ntasks-per-node=8 accessory doctor RUN.yaml",
    )
    verb.add_argument("config", nargs="?", type=a_path, help="run YAML; default: none, this directory")
    verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a setting of the file")

    verb = add_verb(
        verbs,
        "config",
        function_of("accessory.listing", "run_config"),
        "list every setting of a run, with its default and what it means",
        "Print every setting that a run file can hold, as YAML: its value, its default where that is another, and what it "
        "means. With a run file (and settings to change) it checks that file, shows its values, and ends with those that "
        "differ from the defaults.",
        "accessory config",
        "accessory config configs/finetune/quickstart.yaml optim.lr=1e-4",
    )
    verb.add_argument("config", nargs="?", type=a_path, help="run YAML; default: none, the defaults alone")
    verb.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change a setting of the file")
