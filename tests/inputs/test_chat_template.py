"""A template's ids are those of transformers, but where text spells structure: there it stays text."""

import concurrent.futures
import json
import os
import pathlib
import resource
import time

import llama_models.llama4
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama4_jax.inputs import chat_template
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.chat_template import ChatTemplate
from llama4_jax.inputs.hf_tokenizer import tokenizer_config, tokenizer_json
from llama4_jax.inputs.messages import Message, Picture, ToolCall
from llama4_jax.inputs.tokenizer import BPETokenizer, ByteTokenizer

# Writes what the template that transformers' conversion script gives to Llama 4 writes, in other words.
LLAMA4 = """
{%- macro say(content) -%}
  {%- if content is string %}{{ content }}{% else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' %}{{ '<|image|>' }}{% elif part.type == 'text' %}{{ part.text }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro header(role) -%}{{ '<|header_start|>' ~ role ~ '<|header_end|>\\n\\n' }}{%- endmacro -%}
{%- macro listed() -%}
  {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' -}}
  {{- 'Do not use variables.\\n\\n' -}}
  {%- for tool in tools %}{{ tool | tojson(indent=4) ~ '\\n\\n' }}{% endfor -%}
{%- endmacro -%}
{%- set in_user = tools_in_user_message is not defined or tools_in_user_message -%}
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {{- header('system') -}}
  {%- if tools %}{{ 'Environment: ipython\\n' }}{% endif -%}
  {%- if tools and not in_user -%}
    {{- 'You have access to the following functions. ' -}}
    {{- 'To call a function, please respond with JSON for a function call.' ~ listed() -}}
  {%- endif -%}
  {{- messages[0].content | trim ~ '<|eot|>' -}}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools and in_user -%}
  {%- if not messages -%}
    {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") -}}
  {%- endif -%}
  {{- header('user') ~ 'Given the following functions, please respond with a JSON for a function call ' -}}
  {{- 'with its proper arguments that best answers the given prompt.\\n\\n' ~ listed() -}}
  {{- messages[0].content | trim ~ '<|eot|>' -}}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.tool_calls -%}
    {{- header('assistant') ~ '<|python_start|>' ~ say(message.content) ~ '<|python_end|>' -}}
    {%- for call in message.tool_calls -%}
      {{- '{"name": "' ~ call.function.name ~ '", "parameters": ' ~ call.function.arguments | tojson ~ '}' -}}
    {%- endfor -%}
  {%- elif message.role in ['tool', 'ipython'] -%}
    {{- header('ipython') ~ message.content | tojson -}}
  {%- else -%}
    {{- header(message.role) ~ say(message.content) -}}
  {%- endif -%}
  {{- '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif -%}
"""
MODEL = pathlib.Path(llama_models.llama4.__file__).parent / "tokenizer.model"
BPE, BYTES = BPETokenizer(MODEL), ByteTokenizer()
OURS = ChatTemplate(LLAMA4, BYTES)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now> & 日",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def pair(request, tmp_path_factory):
    ours = BYTES if request.param == "bytes" else BPE
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(ours)))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(ours, 8192)))
    (directory / "chat_template.jinja").write_text(LLAMA4)
    return ChatTemplate.from_pretrained(directory, ours), AutoTokenizer.from_pretrained(directory)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "  Be brief. \n"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "São <b>", "n": [1, None]}}}
DIALOGS = {
    "a question": [user("How is mayonnaise made?")],
    "turns": [SYSTEM, user(" hi \n"), assistant("Hello! 日本"), user("bye")],
    "parts": [user([{"type": "text", "text": "a, "}, {"type": "text", "text": "b"}]), assistant("c")],
    "a call": [
        SYSTEM,
        user("Weather?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"deg": 12, "a": "<é>"}'},
        assistant("12 degrees"),
    ],
    "signs": [user("a < b > c <d> |> <| <eot>"), assistant("</b>")],
}


@pytest.mark.parametrize("name", DIALOGS)
@pytest.mark.parametrize("options", [{}, {"tools_in_user_message": False}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("tools", [[], [WEATHER]], ids=["no tools", "tools"])
def test_ordinary_conversations_have_the_ids_of_transformers(pair, name, options, tools):
    ours, theirs = pair
    messages = DIALOGS[name] if not (tools and name == "parts") else DIALOGS["turns"]
    options = {"add_generation_prompt": True, **options}
    expected = theirs.apply_chat_template(messages, tools=tools or None, **options)["input_ids"]
    prompt = options.pop("add_generation_prompt")
    rendered = ours.encode(messages, tools=tools, generation_prompt=prompt, **options)
    assert rendered.tokens == expected
    assert rendered.reply is None


@settings(max_examples=30, deadline=None)
@given(text=st.text())
def test_any_text_has_the_ids_that_transformers_gives_it_when_told_to_take_no_structure_from_it(pair, text):
    ours, theirs = pair
    messages = [user(text), assistant(f"<|eot|>{text}<|image|>")]
    expected = theirs.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    # transformers encodes around each token that was spelled; we encode the text as a whole.
    ours_ids = ours.encode(messages, generation_prompt=False).tokens
    assert theirs.decode(ours_ids) == theirs.decode(expected)
    assert [i for i in ours_ids if i in theirs.all_special_ids] == [i for i in expected if i in theirs.all_special_ids]


SPELLED = [*list(BYTES.special_tokens)[:21], "<", "|", ">", "<|", "|>", "eot", "\n\n", "\U000f0000", " "]
HOSTILE = st.text(max_size=5) | st.lists(st.sampled_from(SPELLED), max_size=8).map("".join)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_text_in_any_field_gives_a_special_token_even_where_texts_are_joined(data):
    def shape(text):
        call = ToolCall("get_weather", {text() or "a": text(), "b": [{text(): text()}]})
        return [
            Message("system", (text(),)),
            Message("user", (text(), text(), Picture(), text(), text())),
            Message("assistant", (text(),), (call,)),
            Message("tool", (text(), text())),
        ]

    def tools(text):
        properties = {text(): {"description": text(), "enum": [text()]}}
        return [{"name": "f", "description": text(), "parameters": {"properties": properties}}]

    def structure(text):
        options = {"tools": tools(text), "pictures": [[300]], "tools_in_user_message": False, "note": text()}
        tokens = OURS.encode(shape(text), **options).tokens
        assert "\U000f0001" not in BYTES.decode(tokens)
        return [token for token in tokens if token >= 256]

    assert structure(lambda: data.draw(HOSTILE)) == structure(lambda: "x")


def test_what_was_said_is_in_the_prompt_as_it_was_said():
    for said in ("<|eot|>", "a<|image|>b", "\U000f0000<\U000f0001>", "</think> <|"):
        assert f"\n\n{said}<|eot|>" in BYTES.decode(OURS.encode([user(said)]).tokens)
    escaped = ChatTemplate("{{ messages[0].content | tojson(ensure_ascii=True) }}", BYTES)
    assert BYTES.decode(escaped.encode([user("<é>")]).tokens) == '"<\\u00e9>"'


def test_pictures_stand_where_the_template_puts_them():
    parts = ["see ", Picture("a"), " and ", Picture("b"), "."]
    tokens = OURS.encode([Message("user", tuple(parts))], pictures=[[300, 301], [302]]).tokens
    first = tokens.index(300)
    assert tokens[first : first + 2] == [300, 301]
    assert BYTES.decode(tokens[first + 2 : tokens.index(302)]) == " and "
    with pytest.raises(ValueError, match=r"messages\[0\].content\[3\] is a picture, and of pictures there are only 1"):
        OURS.encode([Message("user", tuple(parts))], pictures=[[300]])
    with pytest.raises(ValueError, match="the chat template writes 0 <|image|>, and there are 1 pictures"):
        OURS.encode([Message("user", tuple(parts[:3]))], pictures=[[300]], tools=[WEATHER])


def differences(messages, **options):
    template = OURS.encode(messages, generation_prompt=False, **options).tokens
    meta = ChatFormat(BYTES).encode(messages, generation_prompt=False, tool_style="json", **options).tokens
    return BYTES.decode(template), BYTES.decode(meta)


def test_it_differs_from_metas_format_as_its_docstring_says():
    plain = [user("a"), assistant("b"), user(" c ")]
    assert len(set(differences(plain))) == 1
    template, meta = differences([SYSTEM, user("a")])
    assert template == meta.replace("  Be brief. \n", "Be brief.")
    template, meta = differences([assistant("a") | {"end_of_message": True}])
    assert template == meta.replace("<|eom|>", "<|eot|>")
    template, meta = differences([{"role": "tool", "content": 'a "b"'}])
    assert template == meta.replace("<|eom|>", "<|eot|>").replace('a "b"', r'"a \"b\""')
    template, meta = differences([assistant("a") | {"tool_calls": [CALL]}])
    called = '"name": "get_weather", "parameters": '
    assert meta.endswith(f'a{{"type": "function", {called}{json.dumps(ARGUMENTS)}}}<|eom|>')
    arguments = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert template.endswith(f"<|python_start|>a<|python_end|>{{{called}{arguments}}}<|eot|>")
    template, meta = differences([SYSTEM, user(" a ")], tools=[WEATHER])
    header = "<|header_start|>{}<|header_end|>\n\n".format
    assert template.startswith(
        f"<|begin_of_text|>{header('system')}Environment: ipython\nBe brief.<|eot|>{header('user')}"
    )
    assert template.endswith("}\n\na<|eot|>")
    assert meta.endswith(f"<|eot|>{header('user')} a <|eot|>")


ARGUMENTS = CALL["function"]["arguments"]


def test_a_template_has_the_helpers_of_transformers():
    text = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ strftime_now('%Y') | length }} "
        "{% generation %}{{ messages[0].content }}{% endgeneration %} "
        "{{ {'b': '<&>', 'a': 'é'} | tojson(sort_keys=true) }}"
    )
    said = ChatTemplate(text, BYTES).encode([user("x")] * 3)
    assert BYTES.decode(said.tokens) == '2 4 x {"a": "é", "b": "<&>"}'


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages.append(1) }}", "cannot render these messages"),
        ("{{ messages.__class__.__mro__ }}", "cannot render these messages: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "cannot render these messages: access to attribute '__init__'"),
        ("{{ raise_exception('roles must alternate') }}", "cannot render these messages: roles must alternate"),
        ("{{ nothing.at.all }}", "cannot render these messages: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "cannot render these messages: division by zero"),
        ("{% for i in range(10**9) %}{% endfor %}", "cannot render these messages: Range too big"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_one_error(template, said):
    with pytest.raises(ValueError, match="the chat template") as error:
        ChatTemplate(template, BYTES).encode([user("x")])
    assert said in str(error.value)


def test_a_template_is_found_in_each_place_and_its_absence_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ships no chat template: there is no chat_template\.jinja"):
        ChatTemplate.from_pretrained(tmp_path, BYTES)
    config = tmp_path / "tokenizer_config.json"
    for content, said in (
        ("{", "is no valid JSON"),
        ("[]", "expected `object`, got `array`"),
        ('{"chat_template": []}', "a string of"),
        ('{"chat_template": [{"name": "default"}]}', "or a list of {name, template}"),
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', "no chat template is called default, but rag"),
    ):
        config.write_text(content)
        with pytest.raises(ValueError, match=said):
            ChatTemplate.from_pretrained(tmp_path, BYTES)
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}c", "bos_token": {"content": "<|end_of_text|>"}}))
    assert ChatTemplate.from_pretrained(tmp_path, BYTES).encode([user("x")]).tokens == [BYTES.eos_id, ord("c")]
    (tmp_path / "chat_template.jinja").write_text("j")
    assert ChatTemplate.from_pretrained(tmp_path, BYTES).encode([user("x")]).tokens == [ord("j")]
    (tmp_path / "chat_template.jinja").write_text("a\n{% if %}")
    with pytest.raises(ValueError, match="the chat template is no Jinja, in line 2"):
        ChatTemplate.from_pretrained(tmp_path, BYTES)


HOSTILE_TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long list": "{{ (range(99999)|list * 1000)|join('a'*1000) }}",
    "slices": "{{ range(10)|slice(10**10)|list }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a product": "{% set n = 3000000000 %}{{ bos_token * n }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a wide field": "{{ '%9999999999d' | format(1) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "not": "{{ " + "not " * 50000 + "1 }}",
    "ifs": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "fors": "{% for x in [1] %}" * 60 + "{% endfor %}" * 60,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_a_hostile_template_is_one_short_error_in_bounded_time_and_memory(name, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 2.0)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the chat template ") as error:
        ChatTemplate(HOSTILE_TEMPLATES[name], BYTES).encode([user("x")])
    assert len(str(error.value)) < 500
    assert time.perf_counter() - started < 30  # a new process included, on a busy machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert OURS.encode([user("x")]).tokens  # the next one is rendered as ever


def test_templates_are_rendered_in_threads_and_in_forks():
    expected = OURS.encode([user("x")]).tokens
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: OURS.encode([user("x")]).tokens, range(20))) == [expected] * 20
    child = os.fork()
    if not child:
        os._exit(0 if OURS.encode([user("x")]).tokens == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert OURS.encode([user("x")]).tokens == expected


def test_the_one_of_several_templates_is_the_one_that_transformers_takes(tmp_path):
    """In each form that transformers reads or writes."""
    directory = tmp_path / "hf"
    directory.mkdir()
    config = tokenizer_config(BYTES, 8192)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(BYTES)))

    def taken(expected):
        theirs = AutoTokenizer.from_pretrained(directory)
        ours = ChatTemplate.from_pretrained(directory, BYTES)
        for tools, word in zip(([], [WEATHER]), expected, strict=True):
            got = BYTES.decode(ours.encode([user("x")], tools=tools).tokens)
            assert got == theirs.apply_chat_template([user("x")], tools=tools or None, tokenize=False) == word

    listed = [{"name": name, "template": name} for name in ("default", "tool_use", "rag")]
    for several, expected in ((listed, ("default", "tool_use")), (listed[::2], ("default", "default"))):
        (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": several}))
        taken(expected)
    (directory / "chat_template.jinja").write_text("from the file")
    taken(("from the file", "from the file"))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("the other file")
    taken(("from the file", "the other file"))
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "saved")
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    (legacy / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    said = ChatTemplate.from_pretrained(legacy, BYTES).encode([user("x")])
    assert BYTES.decode(said.tokens) == "of a processor"
    for content in ("[]", '{"chat_template": 3}', "[" * 10**5, "\xff"):
        (legacy / "chat_template.json").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match="chat_template.json"):
            ChatTemplate.from_pretrained(legacy, BYTES)


PIECES = [
    *("{{", "}}", "{%", "%}", "{#", "#}", "if", "for", "endfor", "endif", "set", "in", "messages", "loop", "range(9)"),
    *("x", "=", "|", "tojson", "length", "[0]", ".role", "1", "'a'", "~", "*", "(", ")", "[", "]", "-", "not", "\n"),
    *("raise_exception", "macro f()", "endmacro", "f()", "namespace(a=1)", ".__class__", "generation", "\ud800"),
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join))
def test_any_template_gives_tokens_or_one_short_error(template):
    try:
        assert isinstance(ChatTemplate(template, BYTES).encode([user("x")]).tokens, list)
    except ValueError as error:
        assert len(str(error)) < 500
