"""LoRA and biases beside the matrices: their scale, their dropout, and gradients that are partial on each rank."""

from faults.checks import LORA, LORA_EXPERT, LORA_SPARSE
from faults.fault import Fault

FILE, LINEAR, EXPERTS = "accessory/model/adapter.py", "accessory/model/linear.py", "accessory/model/moe/experts.py"
PARTITION = "tests/test_tuning.py::test_dropout_does_not_depend_on_the_partition"
SHARE = "tests/test_tuning.py::test_dropout_keeps_its_share_and_the_mean"

FAULTS = (
    Fault(
        "rank-stabilised LoRA is scaled like the plain one, and the other way round",
        "accessory/tuning/spec.py",
        "(math.sqrt(lora.rank) if lora.rslora else lora.rank)",
        "(lora.rank if lora.rslora else math.sqrt(lora.rank))",
        "tests/test_tuning.py::test_what_an_adapter_is",
    ),
    Fault(
        "the router's adapter is not scaled",
        "accessory/model/moe/router.py",
        "F.linear(scaled(low, self.adapter, adapters), at_least_fp32(self.lora_b))",
        "F.linear(low, at_least_fp32(self.lora_b))",
        LORA,
    ),
    Fault(
        "the experts' adapters are not scaled",
        "accessory/model/moe/kernels/looped.py",
        "return _product(x, self.a[e].mT).mul_(self.scaling)",
        "return _product(x, self.a[e].mT)",
        LORA,
    ),
    Fault(
        "the output layer's adapter is left out of the loss",
        "accessory/model/head.py",
        "low = output.low_rank(hidden, adapters)",
        "low = None",
        LORA,
    ),
    Fault(
        "the partial gradient of A is not summed where a matrix is cut by its outputs",
        LINEAR,
        "lora_a = copy_to_model_parallel_region(self.lora_a, self.mp)",
        "lora_a = self.lora_a",
        LORA_EXPERT,
    ),
    Fault(
        "the partial gradient of B is not summed where a matrix is cut by its inputs",
        LINEAR,
        "F.linear(low, copy_to_model_parallel_region(self.lora_b, self.mp))",
        "F.linear(low, self.lora_b)",
        LORA_EXPERT,
    ),
    Fault(
        "the partial gradient of the embedding's A is not summed",
        LINEAR,
        "copy_to_model_parallel_region(self.lora_a, self.mp).T",
        "self.lora_a.T",
        LORA_EXPERT,
    ),
    Fault(
        "the partial gradients of the experts' adapters are not summed",
        EXPERTS,
        "            parameter = copy_to_model_parallel_region(parameter, self.mp)\n",
        "            pass\n",
        LORA_SPARSE,
    ),
    Fault(
        "rows whose dropout is drawn later have the draws of the first",
        "accessory/model/adapter.py",
        "_scramble(draws.unsqueeze(-1)",
        "_scramble(dropout_draw[: len(draws)].unsqueeze(-1)",
        "tests/test_tuning.py::test_dropout_of_many_rows_takes_little_memory",
    ),
    Fault(
        "dropout is drawn for all of a batch's rows at once",
        "accessory/model/adapter.py",
        "rows.split(max(1, HASHED // x.shape[-1]))",
        "rows.split(max(1, len(rows)))",
        "tests/test_tuning.py::test_dropout_of_many_rows_takes_little_memory",
    ),
    Fault(
        "a bias that every rank adds is not divided among them",
        EXPERTS,
        "return bias / self.mp.size if",
        "return bias if",
        LORA_SPARSE,
    ),
    Fault(
        "the bias of wo is added on every rank before their sum",
        LINEAR,
        "        y = reduce_from_model_parallel_region(y, self.mp)\n"
        "        return y if self.bias is None else y + self.bias",
        "        return reduce_from_model_parallel_region(y if self.bias is None else y + self.bias, self.mp)",
        LORA_EXPERT,
    ),
    Fault(
        "dropout of wo's input begins at the first column on every rank",
        LINEAR,
        "first_column=self.mp.rank * x.shape[-1]",
        "first_column=0",
        PARTITION,
    ),
    Fault(
        "dropout of w2's input begins at the first column on every rank",
        EXPERTS,
        "self.mp.rank * x.shape[1] if self.cut_dims[matrix] == 2 else 0",
        "0",
        PARTITION,
    ),
    Fault(
        "a row's dropout is that of another token",
        "accessory/model/moe/dispatch.py",
        "adapters.of(plan.token_n)",
        "adapters.of(plan.token_n.flip(0))",
        PARTITION,
    ),
    Fault("what is kept is not scaled up", FILE, "return x * keep / (1 - adapter.dropout)", "return x * keep", SHARE),
    Fault("what should be kept is dropped", FILE, "torch.ge(_scramble(", "torch.lt(_scramble(", SHARE),
    Fault(
        "every matrix drops the same entries",
        FILE,
        "_scramble(_scramble(columns) ^ (adapter.seed & _BITS))",
        "_scramble(_scramble(columns))",
        SHARE,
    ),
    Fault(
        "every document drops the same entries",
        FILE,
        "return _scramble(_scramble(keys & _BITS) ^ _scramble(positions))",
        "return _scramble(0 * keys + _scramble(positions))",
        SHARE,
    ),
    Fault(
        "what was trained is saved as it was computed with",
        "accessory/train/save.py",
        "    show_masters(model)\n    trained",
        "    trained",
        "tests/test_adapters.py::test_parts_of_the_base_alone",
    ),
)
