"""The engine: requests join and leave a running batch at every step, whoever asks for them."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.errors import UserError
from accessory.infer.decode_graph import DecodeGraphs, can_record
from accessory.infer.pages import PagePool, page_keys
from accessory.infer.plan import StepPlan
from accessory.infer.prompts import check_tokens
from accessory.infer.request import Progress, Reason, Running
from accessory.infer.sampling import Sampling, TokenChoice, choose
from accessory.infer.scoring import ScorePlan
from accessory.infer.sights import SeenImages
from accessory.infer.text import TextStream, Vocabulary
from accessory.model.answering import CHUNK_TOKENS, GPU_PAGE
from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits

BEAT_S = 60.0
CACHE_SHARE = 0.85
"""Of a GPU's free memory; in the rest there is room for what a step makes, and for the graphs of those of single tokens."""
NOTHING, CLOSE = [0], [1]  # what the first rank sends in place of a plan, which is longer


class Engine:
    """Runs requests together, over a cache of pages that they share.

    A request's answer is a function of the weights, its adapter, its prompt, its sampling and its seed, and of nothing else
    that runs. On a model cut over several ranks, the first one is asked, plans and chooses; the others ``follow``.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Vocabulary,
        *,
        max_seq_len: int,
        cache_tokens: int | None = None,
        most_running: int = 256,
        chunk_tokens: int = CHUNK_TOKENS,
        graphs: bool = True,
    ):
        """
        Args:
            max_seq_len: tokens of a prompt and its answer. cache_tokens: of all that runs at a time; None: as many as the
                GPU has room for; on a CPU those of 16 sequences of 4096, or of one if that is longer.
            chunk_tokens: of prompts in a step, beside the single tokens of answers, so that a long one stalls nobody.
            graphs: False: a GPU is told kernel by kernel what to do, also where it could have a step as one (to compare).
        """
        self.model, self.tokenizer, self.max_seq_len = model, tokenizer, max_seq_len
        self.most_running, self.chunk_tokens = most_running, chunk_tokens
        self._device = model.norm.weight.device
        self._page = GPU_PAGE if self._device.type == "cuda" else 16
        longest = -(-max_seq_len // self._page)
        if cache_tokens is not None:
            pages = cache_tokens // self._page
        elif self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            pages = int(CACHE_SHARE * free) // model.make_cache(1, self._page).page_bytes
        else:
            pages = max(longest, 16 * -(-min(max_seq_len, 4096) // self._page))
        pages = int(model.mesh.mp.all_reduce(torch.tensor(pages, device=self._device), dist.ReduceOp.MIN))
        if pages < longest:
            raise UserError(
                f"the cache has room for {pages * self._page} tokens, and one sequence may have {max_seq_len}: "
                "lower max_seq_len, or give the cache more"
            )
        self._cache = model.make_cache(pages, self._page)
        self.pool = PagePool(pages)
        self._graphs = DecodeGraphs(model, self._cache, max_seq_len) if graphs and can_record(model) else None
        self._sights = SeenImages(model)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.prompt_tokens = 0  # of all that were let in
        self.shared_tokens = 0  # those of them that were not run, since the cache had them
        shape = (model.args.n_layers, model.args.moe.num_experts)
        self.expert_load = torch.zeros(shape, dtype=torch.int64, device=self._device)  # tokens that each expert has run
        self._ids = itertools.count()

    # ---- asked on the first rank

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None = None, images: Sequence[Tensor] = ()
    ) -> Running:
        """Ask for an answer to token ids.

        Args:
            images: see ``Prompt``.
            adapter: the name of the one that is to answer, of those the model was loaded with; None: the base alone.

        Raises:
            UserError: the prompt is empty, holds a token that the model has not, or leaves no room to answer; there is no
                such adapter.
        """
        self.model.logical.member(adapter)
        check_tokens(prompt, self.model.args.vocab_size, "a prompt")
        if len(prompt) >= self.max_seq_len:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room to answer in max_seq_len {self.max_seq_len}")
        if beyond := [token for token in sampling.logit_bias if not 0 <= token < self.tokenizer.n_words]:
            raise UserError(f"logit_bias names token {beyond[0]}; there are {self.tokenizer.n_words}")
        names = [stop for stop in sampling.stop if stop not in self.tokenizer.special]
        matcher = sampling.grammar.matcher() if sampling.grammar else None
        stream = TextStream(self.tokenizer, names, sampling.shown, joined=sampling.joined or matcher is not None)
        tokens, seen = self._sights.numbered(prompt, images)
        request = Running(next(self._ids), tokens, sampling.seeded(), stream, matcher, adapter, seen)
        # the last token is run, whatever is known
        request.keys = list(page_keys(request.prompt[:-1], self._page, request.root))
        self.waiting.append(request)
        return request

    def cancel(self, request: Running) -> str:
        """End a request, wherever it stands; the rest of its text."""
        if request.finish_reason is not None:
            return ""
        if request in self.waiting:
            self.waiting.remove(request)
        return self._end(request, "cancelled")

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def step(self) -> list[Progress]:
        """Run what is planned, on all ranks (a collective); says what became of the requests that got a token."""
        self._admit()
        chosen = self._planned()
        if not chosen:
            return []
        tokens = [request.tokens[request.in_cache : request.in_cache + count] for request, count in chosen]
        images = {number: pixels for request, _ in chosen for number, pixels in request.images.items()}
        plan = StepPlan(
            [self.model.logical.member(request.adapter) for request, _ in chosen],
            tokens,
            [request.in_cache for request, _ in chosen],
            [request.begin for request, _ in chosen],
            [request.pages for request, _ in chosen],
            [n for n, (request, count) in enumerate(chosen) if request.in_cache + count == len(request.tokens)],
            [request.places_behind for request, _ in chosen],
            self._sights.missing(tokens),
        )
        self._send(plan.to_numbers())
        logits, counts = self._run(plan, images)
        self.expert_load += counts.sum(1)
        for number, (request, count) in enumerate(chosen):
            self._advance(request, count)
            if request.sampling.expert_load:
                request.expert_load = counts[:, number] + (0 if request.expert_load is None else request.expert_load)
        ending = [chosen[n][0] for n in plan.ends]
        if not ending:
            return []
        vocabulary = self.tokenizer.n_words
        choices = choose(
            logits[:, :vocabulary],
            [[token for token in request.prompt if token >= 0] for request in ending],
            [request.answer for request in ending],
            [request.sampling for request in ending],
            [request.matcher.allowed(vocabulary) if request.matcher else None for request in ending],
        )
        return [self._extend(request, choice) for request, choice in zip(ending, choices, strict=True)]

    def run(self) -> Iterator[list[Progress]]:
        """Step until nothing is left; other ranks ``follow`` meanwhile, and are released at the end."""
        while not self.is_idle:
            yield self.step()

    def score(self, plan: ScorePlan) -> Tensor:
        """Run it, on all ranks (a collective), beside the requests; see ``ScorePlan.run``."""
        self._send(plan.to_numbers())
        return plan.run(self.model)

    def lead(self, body: Callable[[], None]) -> None:
        """Run ``body``, which asks for answers, on the first rank; the others follow until it has ended."""
        if self.model.mesh.mp.rank:
            return self.follow()
        try:
            body()
        finally:
            self.close()

    def close(self) -> None:
        """Release the ranks that follow (a collective)."""
        self._send(CLOSE)

    def beat(self) -> None:
        """While there is nothing to do: the others, who wait for a plan, must get one to do nothing every BEAT_S."""
        self._send(NOTHING)

    @contextmanager
    def kept_awake(self) -> Iterator[None]:
        """Beat meanwhile."""
        over = threading.Event()

        def beats() -> None:
            while not over.wait(BEAT_S):
                self.beat()

        thread = threading.Thread(target=beats, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # ---- done by all ranks

    def follow(self) -> None:
        """Run what the first rank plans, until it closes."""
        while self.follow_step():
            pass

    def follow_step(self) -> bool:
        """Run one plan of the first rank's; False: it has closed."""
        numbers = self._send([])
        if numbers in (NOTHING, CLOSE):
            return numbers == NOTHING
        if numbers[0] < 0:
            ScorePlan.from_numbers(numbers).run(self.model)
        else:
            self._run(StepPlan.from_numbers(numbers), {})
        return True

    def _send(self, numbers: list[int]) -> list[int]:
        """``numbers`` as the first rank has them: its length with the first of them, then the rest."""
        mp = self.model.mesh.mp
        if mp.size == 1:
            return numbers
        first = 1023
        head = torch.tensor([len(numbers), *numbers[:first]], device=self._device)
        head = mp.broadcast(torch.nn.functional.pad(head, (0, first + 1 - len(head))))
        count, *known = head.tolist()
        if count <= first:
            return known[:count]
        rest = torch.tensor(numbers[first:] or [0] * (count - first), device=self._device)
        return known + mp.broadcast(rest).tolist()

    @torch.inference_mode()
    def _run(self, plan: StepPlan, pixels: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [ends, V], and how many tokens of each document went to each expert of each layer [L, documents, E].

        ``pixels``: of the images, on the first rank.
        """
        if self._graphs and (results := self._graphs.run(plan)):
            return results
        self._sights.receive(plan.tokens, plan.new, pixels)
        tokens, images = self._sights.shown(plan.tokens, plan.shown)
        documents = Documents.of([len(some) for some in plan.tokens], plan.past).to(self._device)
        members = torch.tensor(plan.members, device=self._device) if any(plan.members) else None
        view = self._cache.at(documents, plan.pages, plan.begins)
        inputs = Inputs(torch.tensor(tokens, device=self._device), documents, view, members=members, images=images)
        logits, stats = self.model(inputs, Logits(documents.ends[plan.ends].long()))
        return logits, stats.counts

    # ---- planning

    def _admit(self) -> None:
        """Let requests in, the oldest first, while the pages that they may need can be promised."""
        filling = {key for request in self.running for key in request.keys[self._full_pages(request) :]}
        while self.waiting and len(self.running) < self.most_running:
            request = self.waiting[0]
            known = list(itertools.takewhile(self.pool.is_known, request.keys))
            if set(request.keys[len(known) : len(known) + 1]) & filling:
                return  # another one is about to fill the very page that comes next here
            length = min(len(request.prompt) + request.sampling.max_tokens, self.max_seq_len)
            needed = -(-length // self._page) - len(known)
            if needed + sum(map(self.pool.is_idle, known)) > self.pool.free:
                return
            self.waiting.popleft()
            request.pages = self.pool.share(known)
            request.in_cache = len(known) * self._page
            self.prompt_tokens += len(request.prompt)
            self.shared_tokens += request.in_cache
            request.promised = needed
            request.admitted = time.monotonic()
            self.pool.reserved += needed
            self.running.append(request)
            filling.update(request.keys[len(known) :])
            self._drop_passed(request)

    def _planned(self) -> list[tuple[Running, int]]:
        """What runs in this step, and how many of its tokens: one of each answer, and chunks of the oldest prompts."""
        left, chosen = self.chunk_tokens, []
        for request in self.running:
            count = len(request.tokens) - request.in_cache
            if count > 1 or not request.answer:
                count = min(count, left)
                left -= count
            if count:
                while len(request.pages) * self._page + request.begin < request.in_cache + count:
                    request.pages.append(self.pool.take())
                    request.promised -= 1
                chosen.append((request, count))
        return chosen

    def _full_pages(self, request: Running) -> int:
        return request.in_cache // self._page

    def _advance(self, request: Running, count: int) -> None:
        """The cache has ``count`` more of its tokens: full pages are known by what they hold, passed ones given back."""
        before = self._full_pages(request)
        request.in_cache += count
        for number in range(before, self._full_pages(request)):
            if number == len(request.keys):
                last = request.keys[-1] if request.keys else request.root
                request.keys += page_keys(request.tokens[number * self._page : (number + 1) * self._page], self._page, last)
            self.pool.learn(request.pages[number - request.begin // self._page], request.keys[number])
        self._drop_passed(request)

    def _drop_passed(self, request: Running) -> None:
        """Give back the pages that no token to come will see, its window being beyond them."""
        if window := self.model.args.sliding_window:
            passed = max(0, (request.in_cache - window + 1) // self._page - request.begin // self._page)
            self.pool.release(request.pages[:passed])
            request.pages, request.begin = request.pages[passed:], request.begin + passed * self._page

    def _extend(self, request: Running, choice: TokenChoice) -> Progress:
        ending = {self.tokenizer.special[stop] for stop in request.sampling.stop if stop in self.tokenizer.special}
        if choice.token in ending | {self.tokenizer.eos_id}:
            return Progress(request, self._end(request, "stop"), None)
        request.answer.append(choice.token)
        request.choices.append(choice)
        text = request.stream.add(choice.token)
        if request.matcher:
            request.matcher.add(choice.token)
        if request.stream.stopped or (request.matcher and request.matcher.is_whole):
            text += self._end(request, "error" if request.matcher and request.matcher.has_failed else "stop")
        elif len(request.answer) >= request.sampling.max_tokens or len(request.tokens) >= self.max_seq_len:
            text += self._end(request, "length")
        return Progress(request, text, choice)

    def _end(self, request: Running, reason: Reason) -> str:
        """Take a request out; the rest of its text."""
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
            self.pool.release(request.pages)
            self.pool.reserved -= request.promised
            request.pages, request.promised = [], 0
        return request.stream.finish()
