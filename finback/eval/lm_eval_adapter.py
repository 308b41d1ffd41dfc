"""A finback engine as a model of lm-evaluation-harness (package lm-eval), whose hundreds of tasks then run as they are.

    import lm_eval
    results = lm_eval.simple_evaluate(model=lm_eval_model(finback.LLM(directory)), tasks=["arc_easy"])

The harness brings its own data, from the Hugging Face hub, and its own prompts and scores; finback answers its three requests. It is
no dependency of ours: it is imported when `lm_eval_model` is called, and by nothing else here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from finback.config import InputError
from finback.data.tokenizer import Tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.eval.choices import Continuation, continuation_logprobs, split_tokens

DEFAULT_GENERATED_TOKENS = 256  # the harness's own, where a task says nothing
_ROWS = 8  # scored in one pass
_UNSUPPORTED = ("num_beams",)


@runtime_checkable
class Request(Protocol):
    """What the harness asks: an `Instance` of its own, of which only `args` is read."""

    @property
    def args(self) -> tuple[Any, ...]: ...


def lm_eval_model(llm: LLM) -> Any:
    """The engine as an `lm_eval.api.model.LM`. InputError if lm-eval is not installed, or the engine has no tokenizer."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise InputError("evaluation by the harness needs the package lm-eval; run: pip install lm-eval") from None
    combined = type("FinbackLM", (HarnessRequests, LM), {})
    return combined(llm)


class HarnessRequests:
    """The harness's three kinds of request, and its questions about chat templates, answered by an engine."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()  # the harness's own attributes, where it is a base
        if llm.tokenizer is None:
            raise InputError("the harness asks in text, and the model has no tokenizer; give LLM(tokenizer=...)")
        self.llm, self.tokenizer = llm, llm.tokenizer

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each (context, continuation).

        An empty context is the begin-of-sentence token, or the end-of-sentence token where there is none. A context that does not fit
        is cut at its start.
        """
        pairs = [self._fitting(*self._pair(*request.args)) for request in requests]
        return [(one.logprob, one.greedy) for one in self._scored(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, each token once and with as much context as there is: the last window of a long text is
        full, and only its new tokens count."""
        totals = []
        for request in requests:
            windows = list(rolling_windows(self.tokenizer.encode(request.args[0]), self._start(), self.llm.max_model_len))
            totals.append(sum(one.logprob for one in self._scored(windows)))
        return totals

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """The text behind each context up to a stop text: greedy, unless the task sets do_sample and a temperature."""
        prompts, params = [], []
        for request in requests:
            context, settings = request.args
            asked = sampling_params(settings)
            tokens = self._encode(context) or [self._start()]
            room = self.llm.max_model_len - (asked.max_tokens or 0)
            if room < 1:
                raise InputError(
                    f"the task asks for answers of {asked.max_tokens} tokens, and the model's context is {self.llm.max_model_len}; "
                    "give the task a lower max_gen_toks"
                )
            prompts.append(tokens[-room:])
            params.append(asked)
        return [output.text for output in self.llm.generate(prompts, params)] if prompts else []

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; InputError where the model has no template."""
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text."""
        return self.tokenizer.chat_template

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests goes by."""
        return f"finback-{self.tokenizer.fingerprint()[:16]}"

    def _start(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=adds_bos(self.tokenizer, text))

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            return [self._start()], self.tokenizer.encode(continuation)
        return split_tokens(self.tokenizer, context, continuation, add_bos=adds_bos(self.tokenizer, context))

    def _fitting(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        room = self.llm.max_model_len + 1 - len(after)
        if room < 1 or not after:
            what = f"has {len(after)} tokens" if after else "is empty"
            raise InputError(
                f"a continuation {what}, it must have some, and fit into the model's context ({self.llm.max_model_len})"
            )
        return before[-room:] or [self._start()], after

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Continuation]:
        """In passes over rows of similar length, in the order of `pairs`."""
        order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))
        found: dict[int, Continuation] = {}
        for start in range(0, len(order), _ROWS):
            places = order[start : start + _ROWS]
            found.update(zip(places, continuation_logprobs(self.llm.model, [pairs[place] for place in places]), strict=True))
        return [found[place] for place in range(len(pairs))]


def adds_bos(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the begin-of-sentence token goes in front: a chat template has written it already."""
    return tokenizer.add_bos_token and not (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))


def rolling_windows(tokens: Sequence[int], start: int, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """A text as (what comes before, what is scored), in windows for a model of `context` tokens, as the harness cuts them.

    Every token is scored once, the first behind `start`. A window has one token more than the context, since the last is not read.
    """
    whole, done = [start, *tokens], 1
    while done < len(whole):
        end = min(done + context, len(whole))  # behind at least one token
        yield whole[max(0, end - context - 1) : done], whole[done:end]
        done = end


def sampling_params(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's generation settings as the engine's. InputError for beams, which it does not have."""
    for name in _UNSUPPORTED:
        if settings.get(name, 1) != 1:
            raise InputError(f"the task sets {name} to {settings[name]!r}, which the engine does not do")
    until = settings.get("until") or ()
    lengths = (settings.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    sampled = settings.get("do_sample", float(settings.get("temperature") or 0) > 0)
    return SamplingParams(
        temperature=float(settings.get("temperature") or 1.0) if sampled else 0.0,
        top_p=float(settings.get("top_p") or 1.0) if sampled else 1.0,
        top_k=int(settings.get("top_k") or 0) if sampled else 0,
        min_p=float(settings.get("min_p") or 0.0) if sampled else 0.0,
        max_tokens=next((length for length in lengths if length is not None), DEFAULT_GENERATED_TOKENS),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )
