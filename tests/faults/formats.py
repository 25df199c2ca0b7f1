"""What stands where in the files of each format."""

from faults.fault import Fault

ACCESSORY, HF, PEFT = (f"accessory/checkpoint/{name}.py" for name in ("accessory", "huggingface", "peft"))
CUT = "'tests/test_convert.py::test_cut_files_are_those_of_the_format[2-safetensors-{}]'"
PEFT_READ = "tests/test_adapters.py::test_adapters_that_peft_saved[1]"
PEFT_WRITTEN = "tests/test_adapters.py::test_peft_loads_what_is_exported"

FAULTS = (
    Fault(
        "Hugging Face: the rows of k are not put in order",
        HF,
        'matrix.endswith((".wq.weight", ".wk.weight"))',
        'matrix.endswith(".wq.weight")',
        CUT.format("mixtral"),
    ),
    Fault(
        "Hugging Face: rotary pairs are read the wrong way round",
        HF,
        '"(head pair two) d -> (head two pair) d"',
        '"(head two pair) d -> (head pair two) d"',
        CUT.format("mixtral"),
    ),
    Fault(
        "Hugging Face, fused: w1 and w3 have changed places",
        HF,
        '{"w1": ("gate_up_proj", (0, 2)), "w3": ("gate_up_proj", (1, 2))',
        '{"w1": ("gate_up_proj", (1, 2)), "w3": ("gate_up_proj", (0, 2))',
        "tests/test_convert.py::test_round_trip_is_byte_equal[fused]",
    ),
    Fault(
        "Hugging Face: positions are scaled by the factor, not divided",
        HF,
        'values["rope_scaling"] = 1.0 / factor',
        'values["rope_scaling"] = factor',
        "tests/test_convert.py::test_every_format_gives_transformers_logits_in_every_partition[1]",
    ),
    Fault(
        "Hugging Face: config.json has no sliding window",
        HF,
        '    "sliding_window": "sliding_window",\n',
        "",
        "tests/test_convert.py::test_settings_survive_a_way_through_every_format",
    ),
    Fault(
        "Mistral: params.json has no sliding window",
        "accessory/checkpoint/mistral.py",
        'training = ("max_batch_size", "load_balancing_weight")',
        'training = ("max_batch_size", "load_balancing_weight", "sliding_window")',
        "tests/test_convert.py::test_settings_survive_a_way_through_every_format",
    ),
    Fault(
        "Mistral: w1 and w3 of merged experts have changed places",
        "accessory/checkpoint/mistral.py",
        "            yield dataclasses.replace(tile, key=key)\n",
        '            key = {"w1": key[:-1] + "3", "w3": key[:-1] + "1"}.get(key.rpartition(".")[2], key)\n'
        "            yield dataclasses.replace(tile, key=key)\n",
        "tests/test_convert.py::test_every_format_gives_transformers_logits_in_every_partition[1]",
    ),
    Fault(
        "the sparse layout's w2 is not transposed",
        ACCESSORY,
        'Encoding("e d f -> (e f) d" if tensor == "w2" else "e f d -> (e f) d")',
        'Encoding("e f d -> (e f) d")',
        CUT.format("mixtral_sparse"),
    ),
    Fault(
        "the expert layout numbers each rank's experts from 0",
        ACCESSORY,
        'key = f"{prefix}{owner}.experts.{e}.{weight}.{stored}"',
        'key = f"{prefix}{owner}.experts.{e - region[0].start}.{weight}.{stored}"',
        CUT.format("mixtral"),
    ),
    Fault(
        "a rank's file holds the next rank's part",
        ACCESSORY,
        "region = cut.region(rank, size)",
        "region = cut.region((rank + 1) % size, size)",
        CUT.format("mixtral_sparse"),
    ),
    Fault(
        "PEFT: columns of B are read expert by expert",
        PEFT,
        '"e f r -> (s f) (t r e)"',
        '"e f r -> (s f) (t e r)"',
        PEFT_READ,
    ),
    Fault(
        "PEFT: rank-stabilised LoRA is read as the plain one",
        PEFT,
        'return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)',
        "return alpha / rank",
        PEFT_READ,
    ),
    Fault(
        "PEFT: w3 is read from w1's half of B",
        PEFT,
        "_, rows = FUSED[weight]",
        '_, rows = FUSED[{"w3": "w1"}.get(weight, weight)]',
        PEFT_READ,
    ),
    Fault(
        "PEFT: alpha is written as the scaling",
        PEFT,
        '"lora_alpha": alpha,',
        '"lora_alpha": adapter.scaling,',
        PEFT_WRITTEN,
    ),
    Fault(
        "PEFT: the rows of k's B are not put in order",
        PEFT,
        "AS_IS, row_order(matrix, logical.args)",
        'AS_IS, AS_IS if ".wk." in matrix else row_order(matrix, logical.args)',
        PEFT_WRITTEN,
    ),
    Fault(
        "PEFT: w1 and w3 have one another's A",
        PEFT,
        'Encoding("e r d -> (e t r) d", t=ranks)',
        'Encoding("e r d -> (e t r) d", t=(ranks[1] - 1 - ranks[0], ranks[1]))',
        PEFT_WRITTEN,
    ),
    Fault(
        "an adapter's file says nothing of its scaling",
        "accessory/checkpoint/adapter.py",
        '"scaling": a.scaling,',
        '"scaling": 1.0,',
        "tests/test_adapters.py::test_trained_equals_reloaded[1]",
    ),
    Fault(
        "an adapter's tensors are gathered along the first dimension",
        "accessory/train/save.py",
        "part = torch.cat(parts, dim)",
        "part = torch.cat(parts, 0).view(model.logical.shapes[name])",
        "tests/test_adapters.py::test_trained_equals_reloaded[1]",
    ),
    Fault(
        "merged: the scaling is applied twice",
        "accessory/checkpoint/merge.py",
        "delta = torch.matmul(b, a) * adapter.scaling",
        "delta = torch.matmul(b, a) * adapter.scaling**2",
        "tests/test_adapters.py::test_trained_equals_merged[lora]",
    ),
    Fault(
        "merged: the embedding's adapter is left out",
        "accessory/checkpoint/merge.py",
        "if adapter is None or not adapter.rank:",
        'if adapter is None or not adapter.rank or name == "tok_embeddings.weight":',
        "tests/test_adapters.py::test_trained_equals_merged[lora]",
    ),
    Fault(
        "a gathered parameter is saved as it computes, not as it is kept",
        "accessory/train/save.py",
        "    show_masters(model)\n    mp = model.mesh.mp\n",
        "    mp = model.mesh.mp\n",
        "tests/test_checkpoint.py::test_masters_are_saved_whole_after_a_forward_in_bf16",
    ),
)
