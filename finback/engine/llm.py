"""The engine: requests in, tokens out (DESIGN section 4, "serve").

One call of `LLM.step` is one pass through the model for whatever the scheduler picked: pieces of prompts, one next token of each
running request, and, with speculation, the drafts that are verified along with it. Everything else here is built from adding, such
passes, and aborting. A pass computes for all requests: what it gives those of another stream or call is put into that one's mailbox.
"""

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from finback.config import InputError, ModelConfig
from finback.data.detokenizer import IncrementalDetokenizer
from finback.data.files import read_json
from finback.data.tokenizer import Tokenizer, load_tokenizer
from finback.engine.batch import Chunk
from finback.engine.blocks import BlockManager
from finback.engine.cache_file import model_identity, read_blocks, write_blocks
from finback.engine.config import SamplingParams, is_integer
from finback.engine.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher
from finback.engine.grammar_config import Grammar
from finback.engine.output import EngineStats, Increment, RequestOutput
from finback.engine.request import FinishReason, Request, RequestState
from finback.engine.runner import Backend, Forward, Runner, choose_kernels
from finback.engine.sampler import NO_TOKEN, SamplingRows, SamplingState, TokenLogprobs, accept, sample
from finback.engine.scheduler import ScheduledSequence, Scheduler, SchedulerStats
from finback.engine.stops import StopStrings
from finback.model.checkpoint import load
from finback.model.transformer import Transformer
from finback.ops.compressed import CodeFormat, compressed_rows
from finback.ops.memory import LargePages, available_memory
from finback.ops.packed import BITS, PackedWeight, round_to_packed

CACHE_SHARE = 0.25  # of the memory that is free, at most, unless num_blocks says otherwise

logger = logging.getLogger("finback")

Prompt = str | Sequence[int] | np.ndarray | Tensor


class _Answer:
    """One request's way from tokens to text."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, end_token_ids: frozenset[int], matcher: GrammarMatcher | None
    ) -> None:
        params = request.params
        self.request = request
        self.end_token_ids = end_token_ids.union(params.stop_token_ids)
        if params.ignore_eos:
            self.end_token_ids = frozenset(params.stop_token_ids)
        self.detokenizer = None
        if tokenizer is not None:
            self.detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self.stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self.sampling = SamplingState(params, request.seed, request.prompt_token_ids)
        self.matcher = matcher
        self.error: str | None = None  # why it cannot go on

    def take(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that has become certain with one more token, and why the answer ends with it, if it does."""
        request = self.request
        ends = token_id in self.end_token_ids
        text = ""
        if self.detokenizer is not None and not (ends and not request.params.include_stop_str_in_output):
            text = self.stops.feed(self.detokenizer.feed(token_id))
        return text, "stop" if ends or self.stops.found is not None else None

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        if self.detokenizer is None or self.stops.found is not None:
            return ""
        text = self.stops.feed(self.detokenizer.flush())
        return text if self.stops.found is not None else text + self.stops.flush()


class LLM:
    """A model with its paged cache and its scheduler.

    `LLM(directory)` loads a Hugging Face directory; `LLM(model=model)` shares a model's weights as they are: no copy of them is kept,
    in whatever form. After a change, by an optimizer in place or by giving parameters new data, call `reset_prefix_cache`. Without
    a tokenizer (or the directory of one) prompts are token ids and answers have no text. Not thread-safe: one thread calls it.

    `num_speculative_tokens` drafts that many tokens with the MTP module and verifies them in one pass; which tokens come out does not
    depend on it. `num_blocks` of `block_size` tokens bound the cache; by default they hold `max_num_seqs` requests of full length, or
    as many as fit into a quarter of the free memory. `kv_cache_dtype` "int8" or "fp8" stores 8-bit codes with a scale for each tile of
    a token's values, MLA's rotated keys in bfloat16. Where the native kernels run, the
    weights of a GPTQ directory stay packed in memory, and `head_bits` 8 or 4 lets logits come from a copy of the head that is rounded
    to so many bits, with a scale for every 64 inputs or fewer. With `return_experts` finished answers tell the experts that their
    tokens went to, those of cached prompts, too. Raises InputError for a directory or a number that cannot be used.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        model: Transformer | None = None,
        tokenizer: Tokenizer | str | Path | None = None,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: torch.device | str = "cpu",
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        max_model_len: int | None = None,
        block_size: int = 64,
        num_blocks: int | None = None,
        enable_prefix_caching: bool = True,
        num_speculative_tokens: int = 0,
        kv_cache_dtype: str = "auto",
        head_bits: int | None = None,
        backend: Backend = "auto",
        return_experts: bool = False,
    ) -> None:
        if (directory is None) == (model is None):
            raise InputError("LLM needs a directory or model=..., and not both")
        end_token_ids: set[int] = set()
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(os.path.expanduser(tokenizer))
        if directory is not None:
            directory, device = Path(os.path.expanduser(directory)), _usable(device)
            dtype = _dtype(directory, dtype, device)
            packed = choose_kernels(backend, device, dtype) is not None
            model = load(directory, dtype=dtype, device=device, packed=packed)
            if tokenizer is None and (directory / "tokenizer.json").is_file():
                tokenizer = load_tokenizer(directory)
            end_token_ids.update(_generation_end(directory))
        assert model is not None
        config = model.config
        for name, value in {"max_num_seqs": max_num_seqs, "block_size": block_size, "max_model_len": max_model_len}.items():
            if value is not None and (not is_integer(value) or value < 1):
                raise InputError(f"{name} is {value!r}, it must be a whole number of at least 1")
        if backend not in get_args(Backend):
            raise InputError(f"backend is {backend!r}, it must be 'auto', 'native' or 'torch'")
        self.model, self.tokenizer = model, tokenizer
        self.max_model_len = config.max_position_embeddings if max_model_len is None else max_model_len
        if self.max_model_len > config.max_position_embeddings:
            context = config.max_position_embeddings
            raise InputError(f"max_model_len is {self.max_model_len}, it must be from 1 to the model's context ({context})")
        if kv_cache_dtype not in ("auto", *get_args(CodeFormat)):
            raise InputError(
                f"kv_cache_dtype is {kv_cache_dtype!r}, it must be 'auto' (the dtype of the weights), 'int8' or 'fp8'"
            )
        self._layout = None if kv_cache_dtype == "auto" else compressed_rows(config, cast(CodeFormat, kv_cache_dtype))
        if not is_integer(num_speculative_tokens) or num_speculative_tokens < 0:
            raise InputError(f"num_speculative_tokens is {num_speculative_tokens!r}, it must be a whole number of at least 0")
        if num_speculative_tokens and not model.mtp_modules:
            raise InputError(
                f"num_speculative_tokens is {num_speculative_tokens}, but this model has no MTP module to draft with; use 0"
            )
        if head_bits is not None and (head_bits not in BITS or not is_integer(head_bits)):
            raise InputError(f"head_bits is {head_bits!r}, it must be 8, 4, or None for the head as it is")
        if head_bits is not None and directory is None:
            raise InputError(
                f"head_bits is {head_bits}, but the weights are those of model=...; give a directory, or leave it out"
            )
        if return_experts and not config.num_moe_layers:
            raise InputError("return_experts is True, but this model has no routed experts; leave it out")
        self.num_speculative_tokens = num_speculative_tokens
        eos = config.eos_token_id
        end_token_ids.update(eos if isinstance(eos, tuple) else [] if eos is None else [eos])
        if tokenizer is not None:
            end_token_ids.add(tokenizer.eos_token_id)
        self._end_token_ids = frozenset(end_token_ids)
        if num_blocks is None:
            num_blocks = self._fitting_blocks(max_num_seqs, block_size)
        else:
            self._check_room(num_blocks, block_size)
        self._blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self._scheduler = Scheduler(self._blocks, max_num_seqs, max_num_batched_tokens, self.max_model_len)
        self._runner = Runner(
            model,
            num_blocks,
            block_size,
            max_model_len=self.max_model_len,
            max_rows=max_num_batched_tokens,
            max_head_rows=min(max_num_seqs * (1 + num_speculative_tokens), max_num_batched_tokens),
            mtp=num_speculative_tokens > 0,
            backend=backend,
            record_experts=return_experts,
            layout=self._layout,
        )
        if head_bits is not None:
            if self._runner.backend != "native":
                raise InputError(f"head_bits is {head_bits}, but only the native kernels multiply packed weights; leave it out")
            model.lm_head.packed = _rounded_head(model.lm_head.weight, head_bits).moved(LargePages().copy)
        self._answers: dict[int, _Answer] = {}
        self._mailboxes: dict[int, deque[Increment]] = {}  # of requests of streams and of `generate`
        self._mailbox: deque[Increment] = deque()  # of all others: for `step`
        self._compiler: GrammarCompiler | None = None  # made when the first grammar comes
        self._rows: SamplingRows | None = None  # kept while the same requests run
        self._draft_rows: SamplingRows | None = None
        self._next_id = 0
        self.stats = EngineStats()
        logger.info(
            "engine: %s back-end, %.1f MB of weights%s, %d cache blocks of %d tokens, %d bytes per token and layer",
            self._runner.backend, model.weight_bytes / 1e6, " (packed)" if model.is_packed else "",
            num_blocks, block_size, self.cache_bytes_per_token,
        )  # fmt: skip

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answer all prompts, in one batch as far as there is room, and return the answers in their order.

        A prompt is a text or a list of token ids; `params` is one for all, or one for each. If one of them cannot be used, an
        InputError says so and none is started. An answer that cannot be finished has finish_reason "error" and says why in `error`.
        """
        listed = _listed(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise InputError(f"there are {len(listed)} prompts and {len(each)} params; give one for all, or one for each")
        outputs: dict[int, RequestOutput] = {}
        mailbox: deque[Increment] = deque()
        try:
            for prompt, one in zip(listed, each, strict=True):
                request_id = self.add(prompt, one)
                self._mailboxes[request_id] = mailbox
                outputs[request_id] = RequestOutput(self._answers[request_id].request.prompt_token_ids)
            unfinished = len(outputs)
            while unfinished:
                self._compute()
                while mailbox:
                    increment = mailbox.popleft()
                    outputs[increment.request_id].add(increment)
                    unfinished -= increment.finish_reason is not None
        finally:
            for request_id in outputs:
                self.abort(request_id)
        return list(outputs.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Increment]:
        """The answer to one prompt, one piece for each step; those before its first token, of a long prompt, are empty.

        The request is added when the first piece is asked for; closing the iterator aborts it. Other requests go on meanwhile, and any
        number of streams may be read by turns: a piece that came while another was read is given at once. InputError if the answer
        cannot be finished.
        """
        request_id = self.add(prompt, params or SamplingParams())
        mailbox = self._mailboxes[request_id] = deque()
        nothing = Increment(request_id, "", [], None, None, 0)
        try:
            while mailbox or request_id in self._answers:
                if not mailbox:
                    self._compute()
                part = mailbox.popleft() if mailbox else nothing
                if part.error is not None:
                    raise InputError(part.error)
                yield part
        finally:
            self.abort(request_id)

    def add(self, prompt: Prompt, params: SamplingParams, compiled: CompiledGrammar | None = None) -> int:
        """Queue a request and return its id; `compiled` is what `compile` has made of its grammar before. Raises InputError if it can
        never be answered; the others go on."""
        if not isinstance(params, SamplingParams):
            raise InputError(f"params is {params!r}, it must be SamplingParams")
        token_ids = self._token_ids(prompt)
        vocab = self.model.config.vocab_size
        for token in (*params.stop_token_ids, *(params.logit_bias or ())):
            if token >= vocab:
                raise InputError(f"stop_token_ids or logit_bias names token {token}, outside the model's vocabulary ({vocab})")
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer; give LLM(tokenizer=...) or use stop_token_ids")
        if compiled is None and params.grammar is not None:
            compiled = self.compile(params.grammar)
        matcher = None if compiled is None else compiled.matcher()
        request = Request(self._next_id, token_ids, params)
        self._scheduler.add(request)
        self._next_id += 1
        self._answers[request.request_id] = _Answer(request, self.tokenizer, self._end_token_ids, matcher)
        return request.request_id

    def abort(self, request_id: int) -> bool:
        """End a request now; its blocks are free at once, and nothing more comes of it. False if it has ended already."""
        self._answers.pop(request_id, None)
        mailbox = self._mailboxes.pop(request_id, self._mailbox)
        kept = [increment for increment in mailbox if increment.request_id != request_id]
        mailbox.clear()
        mailbox.extend(kept)
        return self._scheduler.abort(request_id) is not None

    def num_cached_tokens(self, request_id: int) -> int | None:
        """How many tokens of a request's prompt the prefix cache had; None while nothing of it was computed, 0 when it has ended."""
        if request_id not in self._answers:
            return 0
        request = self._answers[request_id].request
        is_new = request.state is RequestState.WAITING and not request.num_preemptions
        return None if is_new else request.num_cached_tokens

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything for `step` to do or to give."""
        return bool(self._answers or self._mailbox)

    def step(self) -> list[Increment]:
        """One pass through the model. Returns what was added to the answers of requests that came by `add`: in this pass, and before
        it in those that streams and `generate` made since the last call."""
        self._compute()
        given = list(self._mailbox)
        self._mailbox.clear()
        return given

    def _compute(self) -> None:
        """One pass through the model, its increments put into the mailboxes."""
        try:
            scheduled = self._scheduler.schedule().scheduled
            if not scheduled:
                return
            chunks = [Chunk(s.token_ids, s.start, s.request.block_table) for s in scheduled]
            wanted = [1 + s.num_drafts if s.samples else 0 for s in scheduled]
            forward = self._runner.forward(chunks, wanted)
            behind = self._take(scheduled, wanted, forward)
            if self.num_speculative_tokens:
                self._draft(scheduled, wanted, behind, forward)
        except BaseException:
            # Interrupted, or out of memory: the cache knows blocks that may not have been written, in the layer of the MTP module at
            # least. Tokens that were taken before are in their mailboxes; every request goes on from its last one.
            self._scheduler.restart()
            raise
        self.stats.steps += 1

    def _take(self, scheduled: list[ScheduledSequence], wanted: list[int], forward: Forward) -> list[Chunk | None]:
        """Sample, keep the drafts that were right, tell the scheduler, and fill the mailboxes. Returns what the MTP module has to see
        of each of `scheduled`: the tokens behind those that were computed; None if there is nothing."""
        sampling = [(sequence, rows) for sequence, rows in zip(scheduled, wanted, strict=True) if rows]
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] | None = None
        if sampling:
            states = [self._answers[sequence.request.request_id].sampling for sequence, _ in sampling]
            drafts = [sequence.request.draft_token_ids[: sequence.num_drafts] for sequence, _ in sampling]
            counts = [sequence.num_drafts for sequence, _ in sampling]
            if self._rows is None or not self._rows.describes(states, counts):
                self._rows = SamplingRows(states, counts, str(forward.logits.device))
            mask, mask_rows = self._grammar_masks(sampling)
            sampled = sample(forward.logits, self._rows, drafts=drafts, mask=mask, mask_rows=mask_rows)
            tokens, logprobs = sampled.token_ids.tolist(), sampled.logprobs
        behind, row = list[Chunk | None](), 0
        for sequence, rows in zip(scheduled, wanted, strict=True):
            if not rows:
                self._scheduler.advance(sequence, [])
                behind.append(self._behind(sequence))
                continue
            end = row + 1 + accept(sequence.request.draft_token_ids[: sequence.num_drafts], tokens[row : row + rows])
            self.stats.drafted_tokens += sequence.num_drafts
            self.stats.accepted_tokens += end - row - 1
            behind.append(self._extend(sequence, tokens[row:end], None if logprobs is None else logprobs[row:end]))
            row += rows
        return behind

    def _grammar_masks(self, sampling: list[tuple[ScheduledSequence, int]]) -> tuple[Tensor | None, list[int]]:
        """The tokens allowed at each row whose request follows a grammar, as bits, and which rows those are."""
        masks: list[Tensor] = []
        rows: list[int] = []
        first = 0
        for sequence, count in sampling:
            matcher = self._answers[sequence.request.request_id].matcher
            if matcher is not None:
                try:
                    masks.append(matcher.masks(sequence.request.draft_token_ids[: sequence.num_drafts]))
                    rows += range(first, first + count)
                except ValueError as error:  # too complex from here on
                    self._answers[sequence.request.request_id].error = str(error)
            first += count
        return (torch.cat(masks) if masks else None), rows

    def _extend(self, sequence: ScheduledSequence, new: list[int], logprobs: list[TokenLogprobs | None] | None) -> Chunk | None:
        """Add sampled tokens to an answer, up to the one that ends it, and give them to whoever waits for them.

        Returns what the MTP module has to see of the request, as `_take` does."""
        request = sequence.request
        answer = self._answers[request.request_id]
        room = request.max_tokens - len(request.output_token_ids)
        text, taken = "", 0
        reason: FinishReason | None = None
        for token in new[:room]:
            if token == NO_TOKEN and answer.error is None:
                answer.error = (
                    "no token can follow: the model's logits are NaN or infinite (damaged weights, or too large for their dtype), "
                    "or the grammar allows none"
                )
            if answer.error is None and answer.matcher is not None:
                try:
                    answer.matcher.advance(token)
                except ValueError as error:  # too complex from here on, or not in the grammar
                    answer.error = str(error)
            if answer.error is not None:
                reason = "error"
                break
            answer.sampling.append(token)
            piece, reason = answer.take(token)
            text += piece
            taken += 1
            if reason is not None:
                break
        if reason is None and taken == room:
            reason = "length"
        failed = NO_TOKEN in new[: taken + 1]
        new = new[:taken]
        behind: Chunk | None = None
        if new:
            self._scheduler.advance(sequence, new)
            if not failed:
                behind = self._behind(sequence, ended=reason is not None)
        self.stats.generated_tokens += taken
        experts: Tensor | None = None
        if reason is not None:
            text += answer.rest()
            blocks = list(request.block_table)
            experts = self._runner.experts(blocks, request.num_tokens - 1)
            self._scheduler.finish(request, reason)
            del self._answers[request.request_id]
            if failed:
                self._clear(blocks)
        asked = None if logprobs is None or request.params.logprobs is None else [one for one in logprobs[:taken] if one]
        stop = answer.stops.found if reason == "stop" else None
        self._mailboxes.get(request.request_id, self._mailbox).append(
            Increment(
                request.request_id, text, new, asked, reason, request.num_cached_tokens, answer.error, experts, stop, failed
            )
        )
        return behind

    def _behind(self, sequence: ScheduledSequence, ended: bool = False) -> Chunk | None:
        """After `advance`: the tokens behind those that the step computed, without the rejected drafts. If the answer has ended, only
        as far as they fill blocks, which the prefix cache keeps."""
        request, start, size = sequence.request, sequence.start, self._blocks.block_size
        end, table = request.num_computed_tokens, request.block_table
        if ended:
            end = end // size * size if self._blocks.enable_prefix_caching else 0
            table = list(table)  # the request's own is about to be emptied
        if end <= start or not self.num_speculative_tokens:
            return None
        return Chunk(request.token_ids[start + 1 : end + 1], start, table)

    def _clear(self, blocks: list[int]) -> None:
        """Remove NaN from the cache: rows that are masked count 0 times, and 0 times NaN is NaN, for whoever gets the block next."""
        self._blocks.reset_prefix_cache()
        self._runner.cache[:, [block for block in blocks if not self._blocks.is_used(block)]] = 0

    def _draft(self, scheduled: list[ScheduledSequence], wanted: list[int], behind: list[Chunk | None], forward: Forward) -> None:
        """Guess the next tokens of the requests that go on. The MTP module sees every position once, with the hidden state that the
        model computed there and the token that follows; for guesses beyond the first it sees its own hidden state instead (V3 section
        2.2; 5.4.3), and the rows that it caches then are written again when the true ones are known. Of a request that has ended it
        sees what the prefix cache keeps: nobody is given its blocks before the next step."""
        chunks: list[Chunk] = []
        rows: list[int] = []
        live: list[Request] = []
        counts: list[int] = []
        for sequence, first, samples, chunk in zip(scheduled, forward.first_rows, wanted, behind, strict=True):
            if chunk is None:
                continue
            chunks.append(chunk)
            rows += range(first, first + len(chunk.token_ids))
            guessing = samples > 0 and sequence.request.request_id in self._answers
            counts.append(int(guessing))
            if guessing:
                live.append(sequence.request)
        if not chunks:
            return
        hidden = forward.hidden
        if len(rows) < len(hidden) or rows != sorted(rows):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        result = self._runner.draft(chunks, counts, hidden)
        ends = [first + len(chunk.token_ids) - 1 for first, chunk in zip(result.first_rows, chunks, strict=True)]
        last = [end for end, count in zip(ends, counts, strict=True) if count]
        for depth in range(self.num_speculative_tokens):
            if not live:
                return
            states = [self._answers[request.request_id].sampling for request in live]
            if self._draft_rows is None or not self._draft_rows.describes(states):
                self._draft_rows = SamplingRows(states, device=str(result.logits.device))
            guesses = sample(result.logits, self._draft_rows, ahead=depth, logprobs=False).token_ids.tolist()
            for request, guess in zip(live, guesses, strict=True):
                request.draft_token_ids.append(max(guess, 0))  # NO_TOKEN: as good a guess as any
            if depth + 1 == self.num_speculative_tokens:
                return
            # A guess further on needs a cached row at the position of the last known token or beyond: only within blocks at hand, and
            # within the context, past which nothing is rotated.
            position = depth - 1
            going = [
                i
                for i, request in enumerate(live)
                if request.num_tokens + position < min(len(request.block_table) * self._blocks.block_size, self.max_model_len)
            ]
            live = [live[i] for i in going]
            if not live:
                return
            hidden = result.hidden[torch.tensor([last[i] for i in going], device=result.hidden.device)]
            chunks = [Chunk(request.draft_token_ids[-1:], request.num_tokens + position, request.block_table) for request in live]
            result = self._runner.draft(chunks, [1] * len(live), hidden)
            last = list(range(len(live)))

    def _token_ids(self, prompt: Prompt) -> list[int]:
        vocab = self.model.config.vocab_size
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:  # surrogates
                raise InputError("the prompt is not a text in Unicode; convert it first") from None
            if self.tokenizer is None:
                raise InputError("the prompt is a text, but there is no tokenizer; give token ids, or LLM(tokenizer=...)")
            token_ids = self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos_token)
        else:
            token_ids = [int(token) if isinstance(token, np.integer) else token for token in _plain(prompt)]
        for token in token_ids:
            if type(token) is int and token >= vocab:
                raise InputError(f"the prompt holds token {token}, outside the model's vocabulary ({vocab})")
        return token_ids  # the scheduler checks the rest

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """What `add` makes of a grammar, which may take a second: one thread may do it while another steps. The latest are kept.
        InputError for a grammar that cannot be followed."""
        if self._compiler is None:
            if self.tokenizer is None:
                raise InputError("a grammar needs a tokenizer; give LLM(tokenizer=...)")
            self._compiler = GrammarCompiler(self.tokenizer, sorted(self._end_token_ids))
        return self._compiler.compile(grammar)

    def reset_prefix_cache(self) -> None:
        """To be called whenever weights have changed: cached prefixes are those of another model, and parameters may lie elsewhere.

        It costs next to nothing. Requests that run meanwhile go on, with the rows that they have.
        """
        self._blocks.reset_prefix_cache()
        self._runner.weights_changed()

    def save_prefix_cache(self, file: str | Path) -> int:
        """Write the cached prefixes that no request holds, for `load_prefix_cache` of a later engine with the same model; the number of
        blocks. With unfinished requests theirs are left out."""
        kept = self._blocks.kept()
        rows = self._runner.cache[:, [block for _, block in kept]]
        write_blocks(Path(file), self._identity(), [digest for digest, _ in kept], rows)
        return len(kept)

    def load_prefix_cache(self, file: str | Path) -> int:
        """Take in what `save_prefix_cache` wrote, before the first request; the number of blocks, 0 if it is another model's.

        The experts that their tokens took are not in the file: with `return_experts` they are told as -1."""
        cache = self._runner.cache
        shape = (cache.shape[0], cache.shape[2], cache.shape[3])
        found = read_blocks(Path(file), self._identity(), shape, cache.dtype)
        if found is None:
            return 0
        digests, rows = found
        blocks = self._blocks.restore(digests)
        cache[:, blocks] = rows[:, rows.shape[1] - len(blocks) :].to(cache.device)
        return len(blocks)

    def _identity(self) -> str:
        """Of the model and of the way in which its rows are stored: both 8-bit formats have rows of one size."""
        return model_identity(self.model) + ("" if self._layout is None else f" {self._layout.format}")

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that the cache takes for one token in one layer."""
        if self._layout is not None:
            return self._layout.row_bytes
        return self.model.config.cache_row_width * self.model.lm_head.weight.element_size()

    @property
    def expert_counts(self) -> Tensor:
        """How many tokens each expert has had, int64 [routers, E], MTP modules left out; no rows without `return_experts`."""
        return self._runner.expert_counts

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return self._blocks.num_blocks

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that the cache holds, of all requests together."""
        return self._blocks.num_blocks * self._blocks.block_size

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds (some of them keep prefixes for later)."""
        return self._blocks.num_available

    @property
    def scheduler_stats(self) -> SchedulerStats:
        """Requests, blocks, prefix hits and preemptions."""
        return self._scheduler.stats()

    def _fitting_blocks(self, max_num_seqs: int, block_size: int) -> int:
        """Blocks for `max_num_seqs` requests of full length, or what fits into a share of the free memory."""
        per_request = -(-self.max_model_len // block_size)
        block_bytes = self._block_bytes(block_size)
        available = available_memory(self.model.lm_head.weight.device)
        if available is None:
            return per_request * max_num_seqs
        fitting = int(available * CACHE_SHARE) // block_bytes
        if fitting < 1:
            raise InputError(
                f"a cache block of {block_size} tokens takes {block_bytes / 2**20:.0f} MiB, more than a quarter of the free "
                "memory; free some, or lower block_size"
            )
        return min(per_request * max_num_seqs, fitting)

    def _check_room(self, num_blocks: int, block_size: int) -> None:
        """InputError for more blocks than the free memory holds."""
        available = available_memory(self.model.lm_head.weight.device)
        if available is None or not is_integer(num_blocks):  # the block manager tells the latter
            return
        block_bytes = self._block_bytes(block_size)
        if num_blocks * block_bytes > available:
            fitting = available // block_bytes
            raise InputError(
                f"num_blocks is {num_blocks}: so many cache blocks of {block_size} tokens take "
                f"{num_blocks * block_bytes / 2**20:,.0f} MiB, and {available / 2**20:,.0f} MiB of memory are free; "
                + (f"give at most {fitting}" if fitting else "free some, or lower block_size")
            )

    def _block_bytes(self, block_size: int) -> int:
        """Of one block in all layers."""
        layers = self.model.config.num_hidden_layers + int(self.num_speculative_tokens > 0)
        return layers * block_size * self.cache_bytes_per_token


def _listed(prompts: Any) -> list[Any]:
    """One prompt, text or token ids, or several."""
    if isinstance(prompts, str):
        return [prompts]
    listed = _plain(prompts)
    several = bool(listed) and (isinstance(listed[0], str) or hasattr(listed[0], "__len__"))
    return listed if several or not listed else [listed]


def _plain(prompt: Any) -> list[Any]:
    """A list of what a sequence, an array or a tensor holds."""
    if isinstance(prompt, np.ndarray | Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise InputError(f"the prompt is {prompt!r}, it must be a text or a list of token ids")
    return list(prompt)


def _usable(device: torch.device | str) -> torch.device:
    """InputError where torch cannot put anything on the device."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):  # whatever the part of torch raises that this machine lacks
        raise InputError(
            f"device is {str(device)!r}, which torch cannot use here; leave it out to run on the CPU (finback doctor lists devices)"
        ) from None
    return found


def _dtype(directory: str | Path, dtype: torch.dtype | Literal["auto"], device: torch.device) -> torch.dtype:
    """The dtype of the weights in memory: with "auto" the stored one, but float32 for float16 on a CPU, which is slow there."""
    if dtype != "auto":
        return dtype
    stored: torch.dtype = getattr(torch, ModelConfig.from_hf(directory).torch_dtype)
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def _rounded_head(weight: Tensor, bits: int) -> PackedWeight:
    """A copy of the head [vocab, D] in few bits, in the largest groups of at most 64 inputs that divide D and fill whole words."""
    width, in_word = weight.shape[1], 32 // bits
    groups = [size for size in range(in_word, 65, in_word) if width % size == 0]
    if not groups:
        raise InputError(f"head_bits is {bits}, but the width {width} of the head is no multiple of {in_word}; leave it out")
    return round_to_packed(weight.detach(), bits, groups[-1])


def _generation_end(directory: Path) -> list[int]:
    """End tokens of generation_config.json, one or several; none where there is no such file."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return []
    eos = read_json(file).get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise InputError(f"{file}: eos_token_id is {eos!r}, it must be a token id or a list of them")
    return tokens
