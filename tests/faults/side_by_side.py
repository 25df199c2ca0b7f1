"""Several adapters over one base: whose each row is, what it is scaled by, what its biases are, what a cache holds of it."""

from faults.fault import Fault

FILE, SOURCE = "accessory/model/adapter.py", "accessory/checkpoint/side_by_side.py"
EXPERTS, ENGINE, META = "accessory/model/moe/experts.py", "accessory/infer/engine.py", "accessory/infer/meta.py"
SEVERAL = 'certify --only "served on mp=1" tuning=several layout=mixtral'
ON_2 = 'certify --only "served on mp=2" tuning=several layout=mixtral'
SPARSE_ON_2 = 'certify --only "served on mp=2" tuning=several layout=mixtral_sparse'
ASKED = "tests/test_served_adapters.py::test_asked_through_the_model"

FAULTS = (
    Fault(
        "adapters side by side are not scaled",
        FILE,
        "scalings[number, first : first + member.rank] = member.scaling",
        "scalings[number, first : first + member.rank] = adapter.scaling",
        SEVERAL,
    ),
    Fault(
        "a token keeps what is another token's adapter's",
        FILE,
        "own = low * scalings[tokens.member]",
        "own = low * scalings[tokens.member.roll(1)]",
        SEVERAL,
    ),
    Fault(
        "a bias of one adapter moves the columns of the next by none",
        FILE,
        "        first += member.bias\n",
        "        pass\n",
        SEVERAL,
    ),
    Fault(
        "a token has the bias of the other adapter",
        FILE,
        "biases[number, first : first + member.bias] = 1.0",
        "biases[-number, first : first + member.bias] = 1.0",
        SEVERAL,
    ),
    Fault(
        "an adapter's A is not where its B is",
        SOURCE,
        "        for called, (given, source) in self.adapters.items():\n",
        "        order = self.adapters.items() if part == 'lora_b' else reversed(self.adapters.items())\n"
        "        for called, (given, source) in order:\n",
        SEVERAL,
    ),
    Fault(
        "rows sorted by expert have the adapters of tokens that are not",
        "accessory/model/moe/dispatch.py",
        "adapters.of(plan.token_n)",
        "adapters.of(plan.token_n.sort().values)",
        SEVERAL,
    ),
    Fault(
        "the router has none of several adapters",
        "accessory/model/moe/router.py",
        "adapted = adapters.reach(self.adapter)",
        "adapted = adapters.reach(self.adapter) and not self.adapter.members",
        SEVERAL,
    ),
    Fault(
        "what is embedded has the adapter of the first token",
        "accessory/model/linear.py",
        "F.linear(scaled(low, self.adapter, adapters), self.lora_b)",
        "F.linear(scaled(low, self.adapter, adapters.of(0 * tokens)), self.lora_b)",
        SEVERAL,
    ),
    Fault(
        "logits have the adapters of the first rows, not of their own",
        "accessory/model/head.py",
        "(x.index_select(0, rows), adapters.of(rows))",
        "(x.index_select(0, rows), adapters.of(torch.arange(len(rows))))",
        "'tests/test_served_adapters.py::test_each_is_what_it_is_alone[1]'",
    ),
    Fault(
        "the bias of w2 counts whole for each expert",
        EXPERTS,
        "weighted_ne, bias_share=weight_n1)",
        "weighted_ne)",
        SEVERAL,
    ),
    Fault(
        "every rank adds w2's bias whole to their sum",
        EXPERTS,
        'share = rows.bias_share / self.mp.size if f"{matrix}_lora_b" in self.whole else rows.bias_share',
        "share = rows.bias_share",
        SPARSE_ON_2,
    ),
    Fault(
        "every rank adds wo's bias whole to their sum",
        "accessory/model/linear.py",
        "bias_share=1 / self.mp.size",
        "bias_share=1.0",
        ON_2,
    ),
    Fault(
        "a page is known by its tokens, whatever the adapter",
        ENGINE,
        "return repr(self.adapter).encode()",
        'return b""',
        SEVERAL,
    ),
    Fault(
        "pages of an answer are known without the adapter",
        ENGINE,
        "last = request.keys[-1] if request.keys else request.root",
        'last = request.keys[-1] if request.keys else b""',
        "tests/test_served_adapters.py::test_what_an_answer_leaves_in_the_cache_is_its_adapters",
    ),
    Fault(
        "the other ranks are not told the adapters",
        "accessory/infer/plan.py",
        "plan.members.append(member)",
        "plan.members.append(0)",
        ON_2,
    ),
    Fault(
        "a step in which the base is asked too has no adapters",
        ENGINE,
        "if any(plan.members) else None",
        "if all(plan.members) else None",
        SEVERAL,
    ),
    Fault(
        "who asks for an adapter that is not there gets the base",
        "accessory/model/logical.py",
        "if name is not None and name not in self.members:",
        "if name is not None and name not in self.members and self.members == name:",
        ASKED,
        (
            (
                "accessory/model/logical.py",
                "return 0 if name is None else 1 + self.members.index(name)",
                "return 1 + self.members.index(name) if name in self.members else 0",
            ),
        ),
    ),
    Fault(
        "an adapter is asked in the base's template",
        META,
        "if template else self.template_of(adapter)",
        "if template else self.template",
        ASKED,
    ),
    Fault(
        "an adapter with changed norms stands beside others, without them",
        SOURCE,
        "if adds or not torch.equal(theirs, ours.to(theirs.dtype)):",
        "if adds:",
        "tests/test_served_adapters.py::test_what_changes_the_base_is_refused",
    ),
    Fault(
        "an adapter that holds NaN is read",
        SOURCE,
        "if not all(map(all_finite, found)):",
        "if not all(map(all_finite, found[:0])):",
        "tests/test_served_adapters.py::test_one_that_is_damaged_would_spoil_the_others",
    ),
)
