"""Modelfiles: the layout of a chat template is found out by using it, and what cannot be told is said."""

import pytest

from finback.data.chat import published_template
from finback.data.modelfile import chat_layout, modelfile
from finback.data.tokenizer import Tokenizer
from tests.tokenizer_samples import family_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a \"fox\".<|im_end|>\n' }}{% endif %}" + CHATML
)
ALPACA = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}### assistant:\n"
PICKY = "{{ raise_exception('only pictures, please') }}"


def deepseek(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.backend, tokenizer.config, template)


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_r1_opens_the_thoughts_and_samples_as_advised(tokenizer: Tokenizer) -> None:
    text = modelfile("r1.gguf", deepseek(tokenizer, published_template("deepseek_r1")), 4096, {})
    assert text.startswith('FROM "./r1.gguf"\n\nTEMPLATE """{{- if .System }}')
    assert '{{- if and $last (ne .Role "assistant") }}<｜Assistant｜><think>\n{{ end }}\n{{- end }}"""\n' in text
    assert "{{ if and $last .Thinking }}<think>\n{{ .Thinking }}\n</think>{{ end }}" in text
    assert lines_of(text, "PARAMETER") == [
        'PARAMETER stop "<｜end▁of▁sentence｜>"',
        'PARAMETER stop "<｜User｜>"',
        'PARAMETER stop "<｜Assistant｜>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
        "PARAMETER num_ctx 4096",
    ]


def test_v3_does_not_think(tokenizer: Tokenizer) -> None:
    text = modelfile("v3.gguf", deepseek(tokenizer, published_template("deepseek_v3")), 100, {"temperature": 0.3})
    assert '{{- if and $last (ne .Role "assistant") }}<｜Assistant｜>{{ end }}\n{{- end }}"""\n' in text
    assert "hink" not in text
    assert lines_of(text, "PARAMETER t") == ["PARAMETER temperature 0.3"]


def test_generation_config_wins_over_the_advice(tokenizer: Tokenizer) -> None:
    r1 = deepseek(tokenizer, published_template("deepseek_r1"))
    text = modelfile("r1.gguf", r1, 100, {"temperature": 1.0, "top_k": 50, "max_length": 20})
    assert sorted(lines_of(text, "PARAMETER t")) == [
        "PARAMETER temperature 1.0",
        "PARAMETER top_k 50",
        "PARAMETER top_p 0.95",
    ]


def test_chatml_is_recognised_with_its_default_system_message() -> None:
    layout = chat_layout(family_tokenizer("smollm", chat_template=CHATML))
    assert layout is not None
    assert (layout.stop, layout.reasoning, layout.system) == (("<|im_end|>", "<|im_start|>"), False, "")
    text = modelfile("m.gguf", family_tokenizer("qwen2", chat_template=WITH_DEFAULT), 2048, {})
    assert 'SYSTEM """You are a "fox"."""\n' in text
    assert "}}<|im_start|>{{ .Role }}\n{{ .Content }}{{ if" in text
    thinking = chat_layout(family_tokenizer("qwen2", chat_template=CHATML + "{# </think> #}"))
    assert thinking is not None
    assert thinking.reasoning
    assert "{{ .Thinking }}\n</think>\n\n{{ end }}{{ .Content }}" in thinking.template


def test_begin_of_sentence_is_written_where_ollama_does_not_put_it(tokenizer: Tokenizer) -> None:
    silent = Tokenizer(tokenizer.backend, tokenizer.config | {"add_bos_token": False}, published_template("deepseek_v3"))
    layout = chat_layout(silent)
    assert layout is not None
    assert layout.template.startswith("<｜begin▁of▁sentence｜>{{- if")
    sentence = family_tokenizer("llama-bpe", chat_template="{{ bos_token }}" + CHATML)
    layout = chat_layout(sentence)
    assert layout is not None
    assert layout.template.startswith("<|endoftext|>{{- range")
    # SmolLM2 calls the start of a turn its begin of sentence, and does not add another.
    smollm = Tokenizer(sentence.backend, sentence.config | {"bos_token": "<|im_start|>"}, WITH_DEFAULT)
    layout = chat_layout(smollm)
    assert layout is not None
    assert layout.template.startswith("{{- range")
    assert layout.system == 'You are a "fox".'


@pytest.mark.parametrize("template", [ALPACA, PICKY, CHATML.replace("im_end", "end"), CHATML + "Sure,"])
def test_other_layouts_get_no_template_and_a_reason(template: str) -> None:
    text = modelfile("m.gguf", family_tokenizer("smollm", chat_template=template), 2048, {})
    assert lines_of(text, "TEMPLATE") == []
    assert lines_of(text, "# No TEMPLATE") == [
        "# No TEMPLATE: the model's directory has a chat template of a layout that finback does not know."
    ]
    assert lines_of(text, "PARAMETER") == ["PARAMETER num_ctx 2048"]


def test_base_models_get_no_template_either() -> None:
    text = modelfile("m.gguf", family_tokenizer("smollm"), 2048, {})
    assert lines_of(text, "# No TEMPLATE") == ["# No TEMPLATE: the model's directory has no chat template."]
