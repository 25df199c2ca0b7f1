"""What is said of a model beside its weights: its sizes, how it was trained, what it is asked in."""

from faults.fault import Fault

SIZES, PEFT = "accessory/checkpoint/description.py", "accessory/checkpoint/peft.py"
JINJA = "accessory/data/jinja_templates.py"
ABSENT = "tests/test_sizes.py -k 'not_said and None'"
TOKENS = "tests/test_trained_template.py::test_transformers_makes_the_tokens_of_training"
TIED = "tests/test_tied.py::test_what_peft_saved_comes_back_as_it_was"
GOES_ON = "'tests/test_tied.py::test_a_run_that_goes_on_from_it_keeps_its_rank[mixtral_sparse-1]'"

FAULTS = (
    Fault(
        "head_dim is dim / n_heads, whatever the tensors tell",
        SIZES,
        '            found.setdefault("head_dim", dim // heads)',
        '            found["head_dim"] = dim // heads',
        ABSENT,
    ),
    Fault(
        "a size of a tensor that is cut is that of one part",
        SIZES,
        "divmod(sizes[size] * math.prod",
        "divmod(sizes[size] // directory.size * math.prod",
        ABSENT,
    ),
    Fault(
        "a description may contradict its tensors",
        SIZES,
        "not in (None, number):",
        "not in (None, number) and number > said:",
        "tests/test_sizes.py -k contradicts",
    ),
    Fault(
        "Hugging Face's balance weight is not read",
        "accessory/checkpoint/huggingface.py",
        '    if values.get("load_balancing_weight") is None:\n',
        "    if True:\n",
        "tests/test_convert.py::test_settings_survive_a_way_through_every_format",
    ),
    Fault(
        "PEFT's one A of gate and up is written twice",
        PEFT,
        "ranks = rows if f",
        "ranks = rows if True or f",
        TIED,
    ),
    Fault(
        "w3 of a checkpoint that ties it is trained with an A of its own",
        "accessory/tuning/spec.py",
        "replace(adapters[name], tied=True, seed=first.seed)",
        "replace(adapters[name], seed=first.seed)",
        GOES_ON,
    ),
    Fault(
        "w3 that is tied drops other entries of what A is given than w1",
        "accessory/tuning/spec.py",
        "tied=True, seed=first.seed)",
        "tied=True)",
        "'tests/test_tied.py::test_its_gradient_is_the_sum_of_both_uses_as_pefts[1]'",
    ),
    Fault(
        "the system prompt stands before every question",
        JINJA,
        r"(system + '\n\n' if loop.first and system else '')",
        r"(system + '\n\n' if system else '')",
        f"{TOKENS} -k metaspace-mixtral",
    ),
    Fault(
        "a chat template is taken without a look at its tokens",
        JINJA,
        "if all(_same(template, text, trained, read, example) for example in examples):",
        "if True:",
        f"{TOKENS} -k metaspace",
    ),
    Fault(
        "a newer tokenizer.json begins texts behind a special token without SentencePiece's blank",
        "accessory/data/tokenizer_models.py",
        "return bool(first != behind and first == blank)",
        "return False",
        "'tests/test_templates.py::test_both_kinds_of_file_are_one_tokenizer'",
    ),
    Fault(
        "the template of most records is not the model's own, but that of the first",
        "accessory/train/data.py",
        "found = data.templates().most_common()",
        "found = list(data.templates().items())",
        "tests/test_trained_template.py::test_a_mix_of_several_templates",
    ),
    Fault(
        "generation asks every model in the reference's template",
        "accessory/data/templates.py",
        "return get_template(trained or own, tokenizer)",
        "return get_template(own, tokenizer)",
        "'tests/test_trained_template.py::test_generation_takes_it_unasked[model]'",
    ),
    Fault(
        "training starts from values that are no numbers",
        "accessory/train/model.py",
        "refuse_damaged=config.model.strict,",
        "refuse_damaged=False,",
        "'tests/test_damaged.py::test_training_refuses_to_start_unless_it_is_told_to[1]'",
    ),
    Fault(
        "the perplexity of no number is one of 305 digits",
        "accessory/train/objective.py",
        "math.inf if loss > 700 else math.exp(loss)",
        "math.exp(min(700.0, loss))",
        "tests/test_damaged.py::test_a_validation_loss_that_is_no_number",
    ),
)
