"""The verbs that use what was trained."""

from pathlib import Path

from accessory.config import Text
from accessory.verbs.options import (
    Verbs,
    a_path,
    add_verb,
    checked,
    function_of,
    model_arguments,
    sampling_arguments,
)


def using_verbs(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "generate",
        function_of("accessory.infer.chat", "run_generate"),
        "answer prompts with a trained model",
        "Answer each prompt with a model: a checkpoint of any format, with adapters laid over it. The prompt is put into "
        "the template that the model was trained with. All prompts are answered together. It prints the answers, or writes "
        "them to a file.",
        'accessory generate runs/quickstart/merged "What does json.dumps do?"',
        'accessory generate BASE --adapter ADAPTER "Why?" --temperature 0.7 --top-p 0.9',
        "accessory generate BASE @questions.jsonl --out answers.jsonl --mp 4",
    )
    model_arguments(verb)
    about = "a text; or @FILE: lines of text, or .jsonl with a prompt or messages each"
    verb.add_argument("texts", nargs="+", type=checked(Text), metavar="PROMPT", help=about)
    verb.add_argument("--out", type=a_path, help="write the answers there, a line of JSON each, in place of printing them")
    verb.add_argument("--raw", action="store_true", help="continue the text as it is, without a template")
    sampling_arguments(verb, temperature=0.0)

    verb = add_verb(
        verbs,
        "chat",
        function_of("accessory.infer.terminal", "run_chat"),
        "a conversation with a trained model, in the terminal",
        "Talk with a model: a checkpoint of any format, with adapters laid over it, in the template that it was trained "
        "with. Answers appear as they grow. /help says what else can be done, such as taking a turn back or saving all.",
        "accessory chat runs/quickstart/merged",
        "accessory chat BASE --adapter ADAPTER --mp 2 --system 'Answer in one sentence.'",
    )
    model_arguments(verb)
    verb.add_argument("--system", type=checked(Text), metavar="TEXT", help="system prompt; default: the template's own")
    sampling_arguments(verb, temperature=0.7)

    verb = add_verb(
        verbs,
        "classify",
        function_of("accessory.infer.chat", "run_classify"),
        "the labels of texts, by a classifier",
        "Say how likely each label is for each text, by a model that a run with model.labels has trained, or transformers. "
        "It is a checkpoint of any format, with adapters laid over it. It prints the labels and writes nothing.",
        'accessory classify BASE --adapter runs/classify/epoch3 "How can I turn a list into JSON?"',
    )
    model_arguments(verb)
    verb.add_argument("texts", nargs="+", type=checked(Text), metavar="TEXT")

    verb = add_verb(
        verbs,
        "compare",
        function_of("accessory.train.report", "run_compare"),
        "loss curves, validation and expert load of runs, side by side",
        "Print the losses of several runs side by side with their largest difference, their validation before and after, "
        "their speed, and each one's load by layer and expert; draw them. It needs run directories of finetune or pretrain.",
        "accessory compare runs/quickstart/mixtral runs/quickstart/mixtral_sparse --png compare.png",
    )
    verb.add_argument("runs", nargs="+", type=a_path, help="run directories")
    verb.add_argument("--png", type=a_path, default=Path("compare.png"), help="picture; default: %(default)s")
