"""MetaModel: a model with its tokenizer, loaded and used in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.side_by_side import SideBySide, open_adapters
from accessory.config import from_mapping
from accessory.data.templates import Template, get_template, model_template
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.dtypes import get_dtype
from accessory.errors import UserError
from accessory.infer.engine import Engine
from accessory.infer.grammar import Grammars
from accessory.infer.offload import Offload, where_experts_are
from accessory.infer.prompts import Prompt, Shown, ask_for, check_tokens, encode_prompts
from accessory.infer.sampling import Sampling
from accessory.infer.scoring import score_example, scored_from
from accessory.infer.sights import SeenImages
from accessory.infer.streams import answers
from accessory.model.answering import plan_answers
from accessory.model.build import build_model
from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.model.memory import check_memory
from accessory.model.moe.layouts import get_layout
from accessory.parallel.launch import Launch, join, own_device
from accessory.parallel.mesh import mesh_of
from accessory.settings import OffloadSection, QuantiseSection
from accessory.visual.vision import count_of_encoders


class MetaModel:
    """A decoder and its tokenizer.

    Attributes:
        llma: the decoder. tokenizer: its tokenizer. max_seq_len: longest sequence, prompt and answer together.
        template: what it is asked in unless another is named: that of its training, else its tokenizer's chat template.
    """

    def __init__(
        self,
        llma: Decoder,
        tokenizer: Tokenizer,
        max_seq_len: int,
        trained_templates: Mapping[str | None, str | None] = MappingProxyType({}),
        cache_tokens: int | None = None,
    ):
        """
        Args:
            trained_templates: names of those that the base (None) and each adapter were trained with.
            cache_tokens: of the engine (see ``Engine``), unless another number is asked for.
        """
        self.llma, self.tokenizer, self.max_seq_len = llma, tokenizer, max_seq_len
        self._trained_templates, self._cache_tokens = trained_templates, cache_tokens
        self._templates, self._grammars = dict[str | None, Template](), dict[str | None, Grammars]()  # by adapter

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that can be asked for."""
        return self.llma.logical.members

    @property
    def template(self) -> Template:
        return self.template_of(None)

    def template_of(self, adapter: str | None) -> Template:
        """The template that an adapter (None: the base) is asked in unless another is named."""
        if adapter not in self._templates:
            self._templates[adapter] = model_template(self._trained_templates.get(adapter), self.tokenizer)
        return self._templates[adapter]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path: str | Path | Sequence[str | Path],
        llama_type: str | None = None,
        llama_config: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        with_visual: bool | None = None,
        max_seq_len: int | None = 4096,
        mp_group: dist.ProcessGroup | None = None,
        dtype: str | torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        quant: bool | str | Mapping[str, str | None] | QuantiseSection | None = False,
        offload: Offload = None,
        strict: bool = True,
        adapters: Mapping[str, str | Path] = MappingProxyType({}),
    ) -> MetaModel:
        """Load a checkpoint of any format into any layout at any model-parallel size; each rank reads only its slices.

        Args:
            pretrained_path: a directory, or several in order: a base, then what changes it (see ``Checkpoint``).
            llama_type: layout to run in, "mixtral" or "mixtral_sparse"; None: the checkpoint's own.
            llama_config, tokenizer_path: config.json, and tokenizer.model or tokenizer.json, in place of the directory's.
            with_visual: False: a model that sees is loaded without its encoders, for texts; True: it must be one that sees.
            max_seq_len: tokens of prompt and answer together; None: as many as the model was made for.
            mp_group: the ranks that hold the model together, each of which must call this; None: this rank alone.
            dtype: to compute in; or its name on the command line, such as "fp32".
            device: None: this process's GPU if there is one, else the CPU.
            quant: how experts and attention are held, quantised as they are read: "nf4" (True is that), "int4", "int3",
                "int2" or "int8" for both, or {"experts": "nf4", "attention": "int8"}.
            offload: which experts are on the device: "experts=4", or {"device_memory": "14GB"} (docs/offloading.md).
            strict: False: go on if tensors are missing or misshapen (they get random values) or unexpected.
            adapters: directories of any format of adapters, by names under which each request can choose one of them.

        Raises:
            UserError: the checkpoint cannot be read, or the group's size does not divide what the layout cuts; an adapter
                changes what the others share.
        """
        if not dist.is_initialized():
            join(Launch(0, 1, 0, 1), dist.HashStore())
        dtype, offload = get_dtype(dtype), OffloadSection.read(offload)
        checkpoint = Checkpoint(pretrained_path, llama_config, strict, QuantiseSection.read(quant))
        if with_visual and not checkpoint.args.visual:
            raise UserError(f"{pretrained_path}: with_visual=True, but this model reads text only")
        named = open_adapters(checkpoint, adapters, llama_config, strict) if adapters else {}
        everything = [checkpoint, *named.values()]
        tokenizer_path = tokenizer_path or next((one.tokenizer for one in everything if one.tokenizer), None)
        if tokenizer_path is None:
            raise UserError(f"{pretrained_path}: no tokenizer.model or tokenizer.json in it; give tokenizer_path")
        tokenizer = Tokenizer(tokenizer_path)
        check_vocabulary(tokenizer, checkpoint.args.vocab_size)
        layout = get_layout(llama_type) if llama_type else checkpoint.layout
        where = torch.device(device) if device is not None else own_device()
        mesh = mesh_of(mp_group)
        source: Checkpoint | SideBySide = checkpoint
        if named:
            members = {name: (one.logical.adapters, one) for name, one in named.items()}
            source = SideBySide(checkpoint.args, checkpoint, members)
        max_seq_len = _longest(max_seq_len, checkpoint.args.max_seq_len)
        sees = checkpoint.args.visual if with_visual is not False else None
        beside = count_of_encoders(sees)
        held = source.logical, layout, mesh.mp.size, dtype, max_seq_len, beside
        plan, cache_tokens = where_experts_are(offload, max_seq_len, lambda section: plan_answers(section, *held))
        check_memory(source.logical, layout, mesh, where, dtype, beside=beside, slot_bytes=plan.slot_bytes if plan else None)
        llma = build_model(
            source.logical, layout, source, mesh=mesh, dtype=dtype, device=where, trains=frozenset(), offload=plan
        )
        llma.pack()
        if sees:
            llma.vision = checkpoint.vision(mesh.mp, dtype, where)
        templates = dict(zip((None, *named), (one.training.template for one in everything), strict=True))
        return cls(llma, tokenizer, max_seq_len, templates, cache_tokens)

    def chat(
        self,
        conversations: Sequence[str | Sequence[Mapping[str, Any]]],
        template: str | None = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        adapter: str | None = None,
    ) -> list[str]:
        """Answer each conversation in the template that the model, or the ``adapter``, was trained with.

        Args:
            conversations: questions, or lists of messages ``{"role": "system" | "user" | "assistant", "content": text}`` of
                which the last is the user's; content can have parts, of which images are ``{"type": "image", "image": ...}``
                (a path, a data: URI, an image of Pillow's).
            template: the name of another one. adapter: which of ``adapters`` answers; None: the base alone.

        Raises:
            UserError: the template has no place for what a conversation holds, or it is too long.
        """
        if isinstance(conversations, str):
            raise UserError("chat takes a list of questions or conversations, not one text: write [question]")
        if any(isinstance(one, Mapping) for one in conversations):
            raise UserError("chat takes a list of conversations, and these are the messages of one: write [messages]")
        asked = [self.asked(conversation, template, adapter=adapter) for conversation in conversations]
        stops = asked[0][1] if asked else ()
        prompts, images = [prompt.tokens for prompt, _ in asked], [prompt.images for prompt, _ in asked]
        return self.generate(prompts, images if any(images) else None, max_gen_len, temperature, top_p, stops, adapter)

    def asked(
        self,
        conversation: str | Sequence[Mapping[str, Any]],
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        adapter: str | None = None,
    ) -> tuple[Prompt, tuple[str, ...]]:
        """What asks for the next answer of a conversation (see ``chat``), and what ends it beside ``</s>``.

        Args:
            tools: that may be called, as OpenAI describes them.
        """
        chosen = get_template(template, self.tokenizer) if template else self.template_of(adapter)
        messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
        return ask_for(messages, tools, chosen, self.tokenizer, self.llma.sight), chosen.stop

    def grammars_of(self, adapter: str | None) -> Grammars:
        """Compiles the grammars (``Sampling.grammar``) of an adapter's answers, which end as its template says."""
        if adapter not in self._grammars:
            special, stops = self.tokenizer.special, self.template_of(adapter).stop
            self._grammars[adapter] = Grammars(self.tokenizer, [special[stop] for stop in stops if stop in special])
        return self._grammars[adapter]

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        images: Shown = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Sequence[str] = (),
        adapter: str | None = None,
    ) -> list[str]:
        """Continue each prompt until ``</s>``, a stop symbol (which is cut off), or ``max_gen_len`` tokens.

        Args:
            prompts: texts, or token ids (which are taken as they are, as templates make them).
            images: what is shown with each prompt: an image (a path, a data: URI, bytes, one of Pillow's, or a tensor
                [3, size, size] as LLaMA2-Accessory's transforms make it), a list of them, or None.
            additional_stop_symbols: texts, or names of special tokens.
            adapter: which of ``adapters`` answers; None: the base alone.

        Raises:
            UserError: ``prompts`` is one text rather than a list, or a prompt is too long.
        """
        if isinstance(prompts, str):
            raise UserError("generate takes a list of prompts, not one text: write [prompt]")
        texts = [""] * len(prompts)
        for step in self._stream(prompts, images, max_gen_len, temperature, top_p, additional_stop_symbols, adapter):
            texts = [text for text, _ in step]
        return texts

    def stream_generate(
        self,
        prompt: str,
        image: Any = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield {"text": the answer so far, "end_of_content": whether it is whole} after each token."""
        text = ""
        shown = None if image is None else image if isinstance(image, Tensor) and image.dim() == 4 else [image]
        steps = self._stream([prompt], shown, max_gen_len, temperature, top_p, additional_stop_symbols, adapter)
        for ((text, ended),) in steps:
            if ended:
                break
            yield {"text": text, "end_of_content": False}
        yield {"text": text, "end_of_content": True}

    def _stream(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        images: Shown,
        max_gen_len: int,
        temperature: float,
        top_p: float,
        stops: Sequence[str],
        adapter: str | None,
    ) -> Iterator[list[tuple[str, bool]]]:
        """Yield, after each step, every prompt's answer so far and whether it has ended; on all ranks the same."""
        several = (stops,) if isinstance(stops, str) else tuple(stops)
        values = {"max_tokens": max_gen_len, "temperature": temperature, "top_p": top_p, "stop": several}
        sampling = from_mapping(Sampling, values, "generate")
        yield from answers(self.engine, self._prompts(prompts, images, bos=True, eos=False), sampling, adapter)

    @cached_property
    def engine(self) -> Engine:
        """What all of this model's generation goes through (made in a collective)."""
        return self.make_engine()

    def make_engine(self, cache_tokens: int | None = None) -> Engine:
        """``cache_tokens``: see ``Engine``."""
        self._refuse_classifier()
        cache_tokens = cache_tokens or self._cache_tokens
        return Engine(self.llma, self.tokenizer, max_seq_len=self.max_seq_len, cache_tokens=cache_tokens)

    @torch.inference_mode()
    def compute_logits(
        self,
        examples: Sequence[str] | Sequence[Sequence[int]],
        images: Shown = None,
        bos: bool = True,
        eos: bool = False,
        adapter: str | None = None,
    ) -> list[Tensor]:
        """Logits of each example, [its length, V], at least fp32.

        Args:
            examples: texts, or token ids (which are taken as they are; ``bos`` and ``eos`` are for texts).
            images: as ``generate`` takes them. adapter: which of ``adapters`` reads them; None: the base alone.
        """
        self._refuse_classifier()
        inputs = self._inputs(self._prompts(examples, images, bos, eos), adapter)
        logits, _ = self.llma(inputs, Logits())
        return list(logits.split(inputs.documents.lengths))

    @torch.inference_mode()
    def classify(self, examples: Sequence[str] | Sequence[Sequence[int]]) -> list[dict[str, float]]:
        """The probability of each of a classifier's labels, by name and the likeliest first, for each example.

        Args:
            examples: texts, or token ids (which are taken as they are, as templates make them).

        Raises:
            UserError: the model is no classifier, or an example is too long.
        """
        labels = self.llma.args.labels
        if not labels:
            raise UserError(
                "this model predicts tokens and knows no labels: use generate, or train a classifier (model.labels)"
            )
        prompts = self._prompts(examples, None, bos=True, eos=False)
        for number, prompt in enumerate(prompts):
            if (length := len(prompt.tokens)) > self.max_seq_len:
                raise UserError(f"example {number} has {length} tokens; from 1 to max_seq_len {self.max_seq_len} are read")
        inputs = self._inputs(prompts)
        logits, _ = self.llma(inputs, Logits(inputs.documents.ends))
        found = (zip(labels, shares, strict=True) for shares in logits.softmax(1).tolist())
        return [dict(sorted(pairs, key=lambda pair: -pair[1])) for pairs in found]

    def evaluate_examples(
        self,
        examples: Sequence[str] | Sequence[Sequence[int]],
        contexts: Sequence[str] | Sequence[Sequence[int]] | None = None,
        images: Shown = None,
        bos: bool = True,
        eos: bool = False,
        adapter: str | None = None,
    ) -> dict[str, list[Any]]:
        """Score examples; what belongs to an example's context (its beginning) is not scored.

        Returns:
            A list with one entry per example under each of "log_likelihood" (sum), "ppl" (exp of the mean negative
            log-likelihood), "max_equal" (greedy decoding would have written it) and "non_context_logits".

        Raises:
            UserError: an example does not begin with its context, or has nothing to score.
        """
        prompts = self._prompts(examples, images, bos, eos)
        begun = None if contexts is None else [one.tokens for one in self._prompts(contexts, images, bos, False)]
        starts = scored_from([prompt.tokens for prompt in prompts], begun)
        logits_of = self.compute_logits(
            [prompt.tokens for prompt in prompts], [prompt.images for prompt in prompts], adapter=adapter
        )
        scored = [
            score_example(prompt.tokens[start:], logits[start - 1 : -1])
            for prompt, start, logits in zip(prompts, starts, logits_of, strict=True)
        ]
        return {name: [one[name] for one in scored] for name in scored[0]}

    def _inputs(self, prompts: Sequence[Prompt], adapter: str | None = None) -> Inputs:
        for number, prompt in enumerate(prompts):
            check_tokens(prompt.tokens, self.llma.args.vocab_size, f"example {number}")
        seen = SeenImages(self.llma)
        numbered = [seen.numbered(*prompt) for prompt in prompts]
        pixels = {number: image for _, images in numbered for number, image in images.items()}
        documents = [tokens for tokens, _ in numbered]
        seen.receive(documents, seen.missing(documents), pixels)
        tokens, images = seen.shown(documents, [0] * len(documents))
        device = self.llma.norm.weight.device
        member = self.llma.logical.member(adapter)
        members = torch.full((len(prompts),), member, device=device) if member else None
        lengths = Documents.of([len(document) for document in documents]).to(device)
        return Inputs(torch.tensor(tokens, device=device), lengths, members=members, images=images)

    def _refuse_classifier(self) -> None:
        if labels := self.llma.args.labels:
            raise UserError(f"this model is a classifier ({', '.join(labels)}) and predicts no tokens: let it classify")

    def _prompts(self, examples: Sequence[Any], images: Shown, bos: bool, eos: bool) -> list[Prompt]:
        return encode_prompts(self.tokenizer, examples, images, self.llma.sight, bos, eos)


def _longest(asked: int | None, made_for: int) -> int:
    """``max_seq_len``, as it is given."""
    if asked is None:
        return made_for
    if not isinstance(asked, int) or asked < 1:
        raise UserError(
            f"max_seq_len: expected a number of tokens, or None: as many as the model was made for; found {asked!r}"
        )
    return asked
