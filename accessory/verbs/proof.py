"""The verb that proves the numbers."""

from accessory.verbs.options import (
    Verbs,
    a_path,
    add_verb,
    function_of,
)


def certify_verbs(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "certify",
        function_of("accessory.certify.command", "run_certify"),
        "prove on this machine that no layout or parallel size changes the numbers",
        "Train one small model in many ways (layouts, model and data parallel sizes, accumulation, packing, full and LoRA), "
        "as real processes, and compare loss, router counts, gradients and weights of each with one plain process; pass "
        "checkpoints through every format. It prints a table; exit code 1 if a cell fails. docs/certify.md reads it.",
        "accessory certify --quick",
        "accessory certify --only mp=2 tuning=lora layout=mixtral",
        "accessory certify --device cuda --world 1,2,4,8 --html certificate.html",
    )
    verb.add_argument("--model", type=a_path, metavar="CONFIG_JSON", help="its shape, as it is; default: a small model")
    verb.add_argument("--world", metavar="N,N", help="numbers of processes; default: 1,2,4, or 1,2 with --quick")
    verb.add_argument("--quick", action="store_true", help="fewer cells: under a minute on two cores")
    verb.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    verb.add_argument(
        "--precision", choices=["fp64", "fp32", "bf16"], help="default: fp64; against hf: fp32; bf16: piece by piece"
    )
    verb.add_argument(
        "--only", nargs="+", default=[], metavar="SETTING=VALUE", help="the cells with these in their line, e.g. mp=2"
    )
    verb.add_argument("--against", choices=["hf"], help="compare with transformers instead of the plain reference")
    verb.add_argument("--json", type=a_path, metavar="FILE", help="write the table as JSON")
    verb.add_argument("--html", type=a_path, metavar="FILE", help="write the table as a page")
