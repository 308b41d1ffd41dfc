"""The Modelfile from which `ollama create NAME -f Modelfile` makes a model of a GGUF file.

Ollama has Go templates of its own for the chat template of the file. Which layout a directory's template has is found out by rendering
conversations with it, not by its text.
"""

from typing import Any, NamedTuple

from finback.config import InputError
from finback.data.tokenizer import ASSISTANT_TOKEN, END_THINK_TOKEN, THINK_TOKEN, USER_TOKEN, Tokenizer

_QUESTION = [{"role": "user", "content": "Q1"}]
_CONVERSATION = [*_QUESTION, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "Q2"}]
_SYSTEM = [{"role": "system", "content": "S"}]

# Words in capitals are filled in. `.Thinking` between its tags tells Ollama which they are, so it stands only in the templates of
# reasoning models; it is filled only where a client has the model continue an answer of its own.
_THINKING = "{{ if and $last .Thinking }}<think>\n{{ .Thinking }}\n</think>GAP{{ end }}"
_DEEPSEEK = """{{- if .System }}{{ .System }}{{ end }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}USER{{ .Content }}
{{- else if eq .Role "assistant" }}ASSISTANTTHINKING{{ .Content }}{{ if not $last }}EOS{{ end }}
{{- end }}
{{- if and $last (ne .Role "assistant") }}ASSISTANTOPEN{{ end }}
{{- end }}"""
_CHATML = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}<|im_start|>{{ .Role }}
THINKING{{ .Content }}{{ if or (ne .Role "assistant") (not $last) }}<|im_end|>
{{ end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""


class Layout(NamedTuple):
    """How a conversation becomes text, for Ollama. `system` is what the template says where no system message is given."""

    template: str
    stop: tuple[str, ...]
    reasoning: bool
    system: str = ""


def chat_layout(tokenizer: Tokenizer) -> Layout | None:
    """The layout of the tokenizer's chat template if it is one that Ollama's template can express here; None otherwise."""
    if tokenizer.chat_template is None:
        return None
    try:
        plain = tokenizer.apply_chat_template(_CONVERSATION, add_generation_prompt=True)
        with_system = tokenizer.apply_chat_template(_SYSTEM + _CONVERSATION, add_generation_prompt=True)
    except InputError:  # it wants other messages than these
        return None
    for bos in ("", tokenizer.bos_token or ""):
        layout = _deepseek(tokenizer, plain, with_system, bos) or _chatml(tokenizer, plain, with_system, bos)
        if layout is not None:  # Ollama puts the token in front by itself where the file says so
            return layout if tokenizer.add_bos_token else layout._replace(template=bos + layout.template)
    return None


def _deepseek(tokenizer: Tokenizer, plain: str, with_system: str, bos: str) -> Layout | None:
    eos, thinking = tokenizer.eos_token, _thinking(tokenizer)
    turns = f"{USER_TOKEN}Q1{ASSISTANT_TOKEN}A1{eos}{USER_TOKEN}Q2{ASSISTANT_TOKEN}"
    for opening in ("", f"{THINK_TOKEN}\n"):
        if (plain, with_system) == (f"{bos}{turns}{opening}", f"{bos}S{turns}{opening}"):
            words = {"THINKING": thinking, "GAP": "", "OPEN": opening}
            words |= {"USER": USER_TOKEN, "ASSISTANT": ASSISTANT_TOKEN, "EOS": eos}
            return Layout(_filled(_DEEPSEEK, words), (eos, USER_TOKEN, ASSISTANT_TOKEN), bool(thinking))
    return None


def _chatml(tokenizer: Tokenizer, plain: str, with_system: str, bos: str) -> Layout | None:
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in _CONVERSATION) + "<|im_start|>assistant\n"
    opening, closing = f"{bos}<|im_start|>system\n", "<|im_end|>\n"
    default = plain.removesuffix(turns)
    system = default.removeprefix(opening).removesuffix(closing)
    if with_system != f"{opening}S{closing}{turns}" or default not in (bos, f"{opening}{system}{closing}"):
        return None
    thinking = _thinking(tokenizer)
    template = _filled(_CHATML, {"THINKING": thinking, "GAP": "\n\n"})
    return Layout(template, ("<|im_end|>", "<|im_start|>"), bool(thinking), "" if default == bos else system)


def _thinking(tokenizer: Tokenizer) -> str:
    """What shows earlier thoughts, for a model that has any."""
    return _THINKING if END_THINK_TOKEN in (tokenizer.chat_template or "") else ""


def _filled(template: str, words: dict[str, str]) -> str:
    for word, text in words.items():
        template = template.replace(word, text)
    return template


def modelfile(file_name: str, tokenizer: Tokenizer, context: int, generation: dict[str, Any]) -> str:
    """The text of a Modelfile for the GGUF file `file_name` beside it; `generation` holds generation_config.json.

    Reasoning models get R1's advised temperature 0.6 and top_p 0.95 unless `generation` says otherwise, and all the model's whole
    context: Ollama's own default of a few thousand tokens would cut thoughts in the middle.
    """
    layout = chat_layout(tokenizer)
    lines = [f"FROM {_quoted('./' + file_name)}", ""]
    if layout is None:
        why = "no chat template" if tokenizer.chat_template is None else "a chat template of a layout that finback does not know"
        lines += [
            f"# No TEMPLATE: the model's directory has {why}.",
            "# Ollama passes the prompt on as it is, or takes one of its own.",
            "",
        ]
    else:
        lines += [f"TEMPLATE {_quoted(layout.template)}", ""]
        lines += [f"SYSTEM {_quoted(layout.system)}", ""] if layout.system else []
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in layout.stop]
    given = {name: generation.get(name) for name in ("temperature", "top_p", "top_k")}
    parameters = {name: value for name, value in given.items() if isinstance(value, int | float)}
    if layout is not None and layout.reasoning:
        parameters = {"temperature": 0.6, "top_p": 0.95} | parameters
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [
        "# The whole context of the model. It costs memory; a smaller one cuts long thoughts off.",
        f"PARAMETER num_ctx {context}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """In three quotes where the text has quotes or lines, which Modelfiles have no escapes for."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
