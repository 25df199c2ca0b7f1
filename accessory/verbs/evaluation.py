"""The verb that measures what was trained."""

from accessory.config import Text, WholeNumber
from accessory.verbs.options import Verbs, a_count, a_path, add_verb, checked, function_of, model_arguments


def evaluation_verb(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "evaluate",
        function_of("accessory.train.evaluate", "run_evaluate"),
        "scores on tasks and data, of one model or of two side by side",
        "Measure a model: a checkpoint of any format, with adapters laid over it. --tasks are those of "
        "lm-evaluation-harness, with its numbers; --data is a data mix, of which it tells loss, perplexity and token "
        "accuracy as a run's validation does. It prints a table, with --against of two models and their difference.",
        "accessory evaluate runs/quickstart/merged --data runs/quickstart/data/later.yaml",
        "accessory evaluate hf --tasks arc_easy,hellaswag --mp 4 --out scores.json",
        "accessory evaluate BASE --adapter ADAPTER --against BASE --tasks my_task --include TASKS --data RUN.yaml",
    )
    model_arguments(verb)
    verb.add_argument(
        "--against", type=a_path, nargs="+", metavar="DIR", help="compare with that model: a base, then what changes it"
    )
    verb.add_argument("--tasks", type=checked(Text, lambda text: text.split(",")), metavar="TASK,TASK", help="by name")
    verb.add_argument("--include", type=a_path, metavar="DIR", help="YAML files of further tasks")
    verb.add_argument("--data", type=a_path, metavar="FILE", help="data mix, or a run's file: what that run holds out")
    verb.add_argument("--num-fewshot", type=checked(WholeNumber), metavar="N", help="examples; default: the task's own")
    verb.add_argument("--limit", type=a_count, metavar="N", help="the first N questions of each task")
    verb.add_argument("--apply-chat-template", action="store_true", help="ask as the model was trained to be asked")
    verb.add_argument("--max-seq-len", type=a_count, metavar="N", help="tokens of a text; default: the model's own")
    verb.add_argument("--out", type=a_path, metavar="FILE", help="write the results as JSON")
