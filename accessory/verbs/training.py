"""The verbs that train."""

from accessory.verbs.options import (
    Verbs,
    a_path,
    add_verb,
    function_of,
)


def training_verbs(verbs: Verbs) -> None:
    start = "Start it with torchrun or srun, a process for each GPU, or plainly for a single one."
    writes = (
        "It writes the run directory OUT: the model (accessory convert gives it any format), states to resume from, "
        "metrics.jsonl, report.png. Ctrl-C and SIGTERM end it after the step at hand, with a state to resume from."
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
