"""What encoders make of an image, where it goes, and who holds it."""

from faults.fault import Fault

VIT, VISION, CONNECTOR = "accessory/visual/vit.py", "accessory/visual/vision.py", "accessory/model/connector.py"
ENCODERS, LLAVA, STEP = "tests/test_encoders.py", "tests/test_llava.py", "tests/test_connector.py"
ORDER = f"{ENCODERS}::test_tokens_come_in_the_references_order"
CLIP = f"{ENCODERS}::test_clip_is_that_of_transformers_with_the_last_norm"
ALONE = f"{ENCODERS}::test_an_image_alone_is_what_it_is_among_others_and_none_is_none"
LOGITS = f"{LLAVA}::test_logits_loss_and_gradients_are_theirs_in_fp64"
SIGLIP = f"{ENCODERS}::test_siglip_is_that_of_transformers_without_its_head"
FORMATS = "tests/test_visual_formats.py"
RINGING = "tests/test_health.py::test_the_tokens_of_images_and_of_text_ring_for_themselves"
ONE = "certify --only sees=clip world=1"

FAULTS = (
    Fault(
        "a micro-batch without an image leaves the connector out",
        "accessory/model/decoder.py",
        "x = self.connector(x, images)",
        "x = self.connector(x, images) if len(images.rows) else x",
        f"{STEP}::test_a_step_on_images_is_that_of_the_reference[ens5-mixtral-2-1-fsdp-2]",
    ),
    Fault(
        "what stands in an image's places is added to",
        CONNECTOR,
        "return x.index_copy(",
        "return x.index_add(",
        ONE,
    ),
    Fault(
        "the plain connector has no norm",
        CONNECTOR,
        'if self.args.preset == "clip" else projected',
        'if self.args.preset == "none" else projected',
        ONE,
    ),
    Fault("the tags change places", CONNECTOR, "words = [start, *words, end]", "words = [end, *words, start]", ORDER),
    Fault(
        "encoders stand side by side in another order",
        VISION,
        "torch.cat([tokens(kind) for kind in group], -1)",
        "torch.cat([tokens(kind) for kind in group[::-1]], -1)",
        ORDER,
    ),
    Fault(
        "DINOv2 sees what is normalised for CLIP",
        VISION,
        "if kind in NORMALISED:",
        'if kind in NORMALISED and kind != "dinov2":',
        ORDER,
    ),
    Fault(
        "SigLIP sees what is normalised for CLIP",
        VISION,
        '"siglip": ((0.5, 0.5, 0.5), (0.5',
        '"none": ((0.5, 0.5, 0.5), (0.5',
        SIGLIP,
    ),
    Fault("SigLIP has the exact GELU", VIT, 'approximate="tanh"', 'approximate="none"', SIGLIP),
    Fault("SigLIP's norms have CLIP's eps", VIT, '1e-6,\n        "siglip."', '1e-5,\n        "siglip."', SIGLIP),
    Fault(
        "SigLIP's first patch is left out as if it were a class token",
        VISION,
        'found if kind == "siglip" else found[:, 1:]',
        "found[:, 1:]",
        f"{LLAVA}::test_logits_loss_and_gradients_are_theirs_in_fp64[siglip-mixtral]",
    ),
    Fault(
        "model-parallel ranks' images change places",
        VISION,
        "return torch.cat(parts)\n",
        "return torch.cat(parts[::-1])\n",
        ORDER,
    ),
    Fault(
        "all ranks put the features of their images together, whichever model they hold",
        VISION,
        "dist.all_gather(parts, padded, group=self.mp.group)",
        "dist.all_gather(parts, padded)",
        "certify --only sees=llava world=4",
    ),
    Fault(
        "SigLIP's head is taken for a part of the encoder",
        "accessory/checkpoint/huggingface.py",
        'if not name.startswith("head."):',
        "if True:",
        f"{LLAVA}::test_what_comes_back_is_what_they_saved[siglip]",
    ),
    Fault(
        "the mean of all cells comes last",
        "accessory/visual/convnext.py",
        "torch.cat([cells.mean(1, keepdim=True), cells], 1)",
        "torch.cat([cells, cells.mean(1, keepdim=True)], 1)",
        f"{ENCODERS}::test_convnext_is_that_of_transformers_with_its_head_norm_on_every_cell",
    ),
    Fault("quick GELU is a little off", VIT, "torch.sigmoid(1.702 * x)", "torch.sigmoid(1.7 * x)", CLIP),
    Fault(
        "CLIP has the GELU that the reference loads it with",
        "accessory/model/visual.py",
        '"gelu" if self.exact else "quick_gelu"',
        '"quick_gelu" if self.exact else "gelu"',
        CLIP,
    ),
    Fault(
        "images attend to one another",
        VIT,
        "F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)",
        "F.scaled_dot_product_attention(*(t.transpose(0, 2) for t in (q, k, v))).transpose(0, 2).transpose(1, 2).flatten(2)",
        ALONE,
    ),
    Fault(
        "DINOv2's table is stretched to its own size",
        VIT,
        "factor = (side + 0.1) / cells",
        "factor = side / cells",
        f"{ENCODERS}::test_dinov2_stretches_its_table_as_its_own_code_does",
    ),
    Fault(
        "LLaVA sees through CLIP's last block",
        VIT,
        "self.blocks[:-1] if self.before_last else self.blocks",
        "self.blocks",
        f"{ENCODERS}::test_llava_takes_what_goes_into_the_last_block",
    ),
    Fault("LLaVA sees the class token", VISION, "else found[:, 1:]", "else found[:, :-1]", LOGITS),
    Fault(
        "transformers' queries and keys change places",
        "accessory/checkpoint/encoders.py",
        'enumerate(("q_proj", "k_proj", "v_proj"))',
        'enumerate(("k_proj", "q_proj", "v_proj"))',
        LOGITS,
    ),
    Fault(
        "nothing is rounded as in the reference",
        VISION,
        "torch.float16 if args.exact",
        "None if args.exact",
        f"{ENCODERS}::test_the_references_rounding_is_there_if_asked_for",
    ),
    Fault(
        "all that the reference leaves in a file is an encoder's",
        "accessory/checkpoint/encoders.py",
        "and not _UNUSED.fullmatch(name)",
        "",
        f"{FORMATS}::test_what_the_reference_leaves_beside_its_encoders_is_tolerated_and_nothing_else",
    ),
    Fault(
        "ens5 is read as ens",
        "accessory/checkpoint/accessory.py",
        '.endswith("ens5") else "ens"',
        '.endswith("ens6") else "ens"',
        f"{FORMATS}::test_what_the_reference_calls_a_model_says_how_it_sees",
    ),
    Fault(
        "the connector is an adapter's to change",
        "accessory/tuning/spec.py",
        '"connector": r"^connector\\.",',
        '"connector": r"^output\\.",',
        "tests/test_visual_run.py::test_a_run_saves_what_it_sees_with_and_goes_on_in_the_other_layout",
    ),
    Fault(
        "image tokens are counted as text",
        "accessory/train/health.py",
        "cls(counts - seen,",
        "cls(counts,",
        f"{STEP}::test_the_routers_of_images_and_of_text_are_told_apart",
    ),
    Fault(
        "the alarms of images are those of all tokens",
        "accessory/train/health.py",
        "judged.counts.sum(1).min(), judged.load",
        "judged.counts.sum(1).min(), health.load",
        RINGING,
    ),
    Fault(
        "a step without an image rings for images",
        "accessory/train/health.py",
        "            if rows:",
        "            if True:",
        RINGING,
    ),
    Fault(
        "encoders take no memory",
        "accessory/infer/meta.py",
        "beside = count_of_encoders(sees)",
        "beside = 0",
        "tests/test_seen_use.py::test_without_encoders_a_model_takes_less_memory_and_answers_texts",
    ),
    Fault(
        "the routing of images is that of the first tokens",
        "accessory/model/moe/router.py",
        "told.index_select(1, image_rows)",
        "told.index_select(1, image_rows.argsort())",
        f"{STEP}::test_the_routers_of_images_and_of_text_are_told_apart",
    ),
)
