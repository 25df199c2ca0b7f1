"""Matrices in few bits: whose scale a block has, what a cut makes of it, and what stands beside it."""

from faults.fault import Fault

CODECS, SOURCES = "accessory/model/codecs.py", "accessory/checkpoint/quantise.py"
LINEAR, EXPERTS, HELD = (f"accessory/model/{name}.py" for name in ("linear", "moe/experts", "quantised"))
PACKED, CODES_MULTIPLIED = "accessory/model/packed.py", "tests/test_packed.py::test_products_by_codes_are_those_by_numbers"
KERNELS = "accessory/model/moe/kernels"
TRITON_CODES, BY_CODES = "accessory/model/triton_codes.py", "tests/test_triton.py::test_products_by_codes"
GPTQ, TESTS_GPTQ = "accessory/checkpoint/gptq.py", "tests/test_gptq.py::test_a_directory_of_gptq"
WRITTEN = "tests/test_gptq.py::test_a_directory_is_written_and_read_back_byte_for_byte"
TESTS = "tests/test_quantise.py::test_"
DEFINITION = f"{TESTS}a_codec_is_what_its_definition_says"
MIXTRAL = f"{TESTS}the_cut_of_the_quantised_is_the_quantised_cut_at_mixtrals_sizes"
FILES, BEHIND = (
    f"{TESTS}files_load_into_any_partition_without_being_quantised_again",
    f"{TESTS}adapters_stand_behind_their_base_however_it_is_held",
)
ROUNDING, CALIBRATE = "accessory/model/rounding.py", "accessory/checkpoint/calibrate.py"
GPTQS_CODES, CALIBRATED = (
    f"tests/test_calibrate.py::test_{name}" for name in ("codes_are_those_of_the_definition", "the_command")
)
FSDP = "certify --only tuning=qlora world=2 dp=fsdp"
CUT = "certify --only tuning=qlora world=2 mp=2 layout=mixtral_sparse experts=nf4-2"
ROWS = "certify --only tuning=qlora world=2 mp=2 layout=mixtral_sparse experts=int8"
SHARED_HEADS = "certify --only tuning=qlora world=4 mp=4 layout=mixtral experts=int8"

FAULTS = (
    Fault("a block has its neighbour's scale", CODECS, "scale_of[some]", "scale_of.roll(1, 1)[some]", FSDP),
    Fault(
        "a row's codes are made by the largest value of a rank's own columns",
        SOURCES,
        "cover = (*rows, slice(blocks.start * group, blocks.stop * group))",
        "cover = (*rows, slice(blocks.start * group, blocks.stop * group) if codec.group or part == 'scales' else columns)",
        ROWS,
        more=(
            (
                SOURCES,
                "first = blocks.start * each",
                "first = blocks.start * each if codec.group or part == 'scales' else columns.start",
            ),
        ),
    ),
    Fault(
        "blocks are counted from where a rank's columns begin",
        SOURCES,
        "blocks = slice(columns.start // each, -(-columns.stop // each))",
        "blocks = slice(0, -(-(columns.stop - columns.start) // each))",
        CUT,
        more=((SOURCES, "pop(part)[..., columns.start - first : columns.stop - first]", "pop(part)"),),
    ),
    Fault(
        "codes are chosen by another scale than the one that is kept",
        CODECS,
        'scale = self.kept(spread / {"nf4": 1, "int8": 127}.get(self.kind, self.most))',
        'scale = (spread / {"nf4": 1, "int8": 127}.get(self.kind, self.most)).clamp(min=1e-9)',
        DEFINITION,
    ),
    Fault(
        "the codes of a byte stand the other way round",
        CODECS,
        ".int() << places * bits)",
        ".int() << places.flip(0) * bits)",
        DEFINITION,
    ),
    Fault(
        "int4's zero is left out",
        CODECS,
        'values -= flat["zeros"][some].unsqueeze(-1)',
        "values -= 8",
        DEFINITION,
    ),
    Fault(
        "nf4's borders are in the middle of the codes, not of their values",
        CODECS,
        "return (table[1:] + table[:-1]) / 2",
        "return (torch.arange(1, 16, device=device) - 8) / 8",
        f"{TESTS}nf4_is_that_of_bitsandbytes",
    ),
    Fault(
        "a block that is not finite is quantised as zeros",
        CODECS,
        "bits = bits.where(bits != 0, 1.0)",
        "bits = bits.where(bits > 0, 1.0)",
        DEFINITION,
    ),
    Fault(
        "attention's adapters are dropped beside quantised matrices",
        LINEAR,
        "            y = quantised_linear(x, self.quantised(x.dtype, self.codec).rows(self.own_rows), bias)\n",
        "            return quantised_linear(x, self.quantised(x.dtype, self.codec).rows(self.own_rows), bias)\n",
        FSDP,
    ),
    Fault(
        "the experts' adapters are dropped beside quantised matrices",
        EXPERTS,
        "        if not any(adapter.bias",
        "        if self.codecs or not any(adapter.bias",
        FSDP,
    ),
    Fault(
        "of a head that ranks share each takes all rows of its quantised matrix",
        LINEAR,
        ".rows(self.own_rows), bias)",
        ".rows(self.own_rows and slice(0, self.own_rows.stop - self.own_rows.start)), bias)",
        SHARED_HEADS,
    ),
    Fault(
        "the input's gradient is that of the first rows of a quantised matrix alone",
        HELD,
        "return dy @ ctx.weights[:][0], None",
        "return dy[..., :4] @ ctx.weights[:][0][:4], None",
        FSDP,
    ),
    Fault(
        "in the sparse layout's files w2's codes lie transposed",
        "accessory/checkpoint/accessory.py",
        'if tensor == "w2" else',
        'if weight == "w2" else',
        FILES,
    ),
    Fault(
        "zeros of GPTQ's first version are read as they are",
        GPTQ,
        'config.get("checkpoint_format") == "gptq_v2" else 1',
        'config.get("checkpoint_format") == "gptq_v2" else 0',
        f"{TESTS_GPTQ}[gptq-hub]",
    ),
    Fault(
        "AWQ's columns are read in the order of GPTQ's",
        GPTQ,
        "AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)",
        "AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
        f"{TESTS_GPTQ}[awq-hub]",
    ),
    Fault(
        "rotary pairs of GPTQ's keys are not put in order",
        GPTQ,
        'matrix.endswith((".wq.weight", ".wk.weight"))',
        'matrix.endswith(".wq.weight")',
        f"{TESTS_GPTQ}[gptq_v2-gptqmodel]",
    ),
    Fault(
        "compressed-tensors' zeros are taken from the highest bits on",
        "accessory/checkpoint/compressed.py",
        "return unpacked(words.T.contiguous().view(torch.uint8), 4).T",
        "return unpacked(words.T.contiguous().view(torch.uint8).flip(-1), 4).T.flip(0)",
        f"{TESTS_GPTQ}[compressed-gptqmodel]",
    ),
    Fault(
        "zeros are written as of version 2, and called version 1's",
        GPTQ,
        '"checkpoint_format": "gptq_v2"',
        '"checkpoint_format": "gptq"',
        f"{WRITTEN}[gptq-int4-8]",
    ),
    Fault(
        "AWQ's columns are written in the order of GPTQ's",
        GPTQ,
        "[..., list(self.order)]\n        stored",
        "\n        stored",
        f"{WRITTEN}[awq-int4-8]",
    ),
    Fault(
        "an adapter's base is known by its numbers, however they were held",
        "accessory/checkpoint/open.py",
        "        if directory.fingerprint == self.origin:\n",
        "        if directory.fingerprint in (self.origin, self._fingerprint_if(directory.quantise)):\n",
        BEHIND,
    ),
    Fault(
        "a quantised matrix is trained, and never changes",
        "accessory/tuning/spec.py",
        "if args.quantise and (packed :=",
        "if None and (packed :=",
        f"{TESTS}what_is_quantised_does_not_train",
    ),
    Fault(
        "what an input loses is made up for as if all inputs came alike",
        ROUNDING,
        ") / factor[n, n]",
        ")",
        GPTQS_CODES,
    ),
    Fault(
        "what a block loses is not made up for by those behind it",
        ROUNDING,
        "left[block.stop :] -= ",
        "left[block.stop :] + ",
        GPTQS_CODES,
    ),
    Fault(
        "a block's grid is that of its values before they make up for others",
        ROUNDING,
        "_grids(codec, left[block])",
        "_grids(codec, wanted[block])",
        GPTQS_CODES,
    ),
    Fault(
        "a block's grid is chosen as if all its inputs counted alike",
        ROUNDING,
        "lost += error**2",
        "lost += (error * factor[n, n]) ** 2",
        GPTQS_CODES,
    ),
    Fault(
        "a block's inputs are rounded in the order in which they stand",
        ROUNDING,
        "order = _order(cost)",
        "order = list(range(len(cost)))",
        GPTQS_CODES,
    ),
    Fault(
        "a block rounded anew is kept though it costs more",
        ROUNDING,
        "better = (step * (2 * pull + cost @ step)).sum(0) < 0",
        "better = (step * (2 * pull + cost @ step)).sum(0) < torch.inf",
        GPTQS_CODES,
    ),
    Fault(
        "a block is rounded anew for what it was to be, whatever the others lack",
        ROUNDING,
        "pull = cost[block] @ (rounded - wanted)",
        "pull = cost[block, block] @ (rounded - wanted)[block]",
        GPTQS_CODES,
    ),
    Fault(
        "grids are tried near the scale that a block had, not near the one that fits",
        ROUNDING,
        "held.scale - (unit * pull).sum(0) / bend",
        "held.scale",
        GPTQS_CODES,
    ),
    Fault(
        "a block's zero stays that of its first rounding",
        ROUNDING,
        "beside = (-1, 0, 1) if",
        "beside = (0,) if",
        GPTQS_CODES,
    ),
    Fault(
        "what a code by itself changes is not told to those behind it",
        ROUNDING,
        "        pull += torch.outer(cost[n], changed)\n",
        "",
        f"{GPTQS_CODES}[int2-16]",
    ),
    Fault(
        "of three bytes the middle one gives its halves to the wrong codes",
        CODECS,
        "[first | (second & 15) << 8, second >> 4 | third << 4]",
        "[first | (second >> 4) << 8, second & 15 | third << 4]",
        f"{TESTS}a_codec_is_what_its_definition_says[int3]",
    ),
    Fault(
        "a zero of three bits is read as of four",
        GPTQ,
        "encoding = BitsEncoding(pattern, logical.codecs[matrix].bits, order",
        "encoding = BitsEncoding(pattern, 4, order",
        f"'{TESTS_GPTQ}[gptq_v2 3-gptqmodel]'",
    ),
    Fault(
        "on a CPU int4 is multiplied as if every block's zero were in the middle",
        PACKED,
        '(8 - parts["zeros"].float()) * bits.float()',
        '0 * parts["zeros"].float()',
        f"{CODES_MULTIPLIED}[int4-32]",
    ),
    Fault(
        "on a CPU many rows are multiplied by int8's codes without their scales",
        PACKED,
        "(self.codes.float() * self.scales.float().unsqueeze(1))",
        "(self.codes.float() * self.scales.float()[0])",
        f"{CODES_MULTIPLIED}[int8]",
    ),
    Fault(
        "on a GPU the bits of a code that lie in the next byte are put into the wrong place",
        TRITON_CODES,
        ".to(tl.int32) << 8",
        ".to(tl.int32) << 4",
        f"{BY_CODES}[int3-32-torch.float64]",
    ),
    Fault(
        "on a GPU a code at a block's end has the next block's scale",
        TRITON_CODES,
        "(deep // group)[None, :]",
        "((deep + 1) // group)[None, :]",
        f"{BY_CODES}[nf4-32-torch.float64]",
    ),
    Fault(
        "on a GPU an expert's codes are multiplied by all rows up to its last",
        TRITON_CODES,
        "start = tl.load(row_ends + expert - 1, mask=expert > 0, other=0) if ENDS else 0",
        "start = 0",
        f"{BY_CODES}[int8-torch.float64]",
    ),
    Fault(
        "many rows of a quantised matrix are given to the product of a few",
        HELD,
        "if x.shape[:-1].numel() <= FEW_ROWS else None",
        "",
        "tests/test_triton.py::test_answers_by_codes",
    ),
    Fault(
        "many rows of quantised experts are given to the product of a few",
        f"{KERNELS}/codes.py",
        "x.shape[0] <= FEW_ROWS * matrices[0].shape[0] and ",
        "",
        "tests/test_triton.py::test_answers_by_codes",
    ),
    Fault(
        "of quantised experts a kernel that takes all at once makes all numbers",
        f"{KERNELS}/__init__.py",
        "all(isinstance(w, PlainWeights) for w in matrices) and ",
        "",
        "tests/test_kernels.py::test_auto_picks_by_how_weights_are_held",
    ),
    Fault(
        "every expert is rounded for the rows of all",
        CALIBRATE,
        "yield from rows.x_nD.split(_counts(rows))",
        "yield from [rows.x_nD] * len(rows.ends_e)",
        CALIBRATED,
    ),
    Fault(
        "w2 is rounded for rows without their routing weights",
        CALIBRATE,
        "F.linear(x, w3[e]), weight)",
        "F.linear(x, w3[e]), weight.new_ones(weight.shape))",
        CALIBRATED,
    ),
    Fault(
        "a matrix is rounded for rows that come through whole ones before it",
        CALIBRATE,
        "            matrix.copy_(codec.decode(parts, matrix.dtype))\n",
        "",
        CALIBRATED,
    ),
    Fault(
        "an expert that few rows come to is rounded for them",
        CALIBRATE,
        "if count < LEAST_ROWS else encode_for_rows",
        "if not count else encode_for_rows",
        CALIBRATED,
    ),
    Fault(
        "images are left out of calibration",
        "accessory/checkpoint/calibrate.py",
        "yield connector(x, vision(batch.images.to(self.device))) if connector and vision and batch.images else x",
        "yield x",
        "tests/test_visual_run.py::test_calibrated_with_what_images_show",
    ),
)
