"""The `openai` package is the judge: what it sends is understood, and what it is answered it reads as meant."""

import base64
import io
import json
import math

import openai
import pytest
from fake_engine import FakeEngine
from micro_run import picture_processor
from PIL import Image
from serving import MODEL, USER, serving

from llama4_jax.inputs.tokenizer import ByteTokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": CITY}}
OTHER = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TEXT = "The quick brown fox — über 漢字."


@pytest.fixture(scope="module")
def server():
    processor = picture_processor()
    with serving(processor=processor, script=TEXT) as found:
        yield found


@pytest.fixture(autouse=True)
def scripts_are_put_back(server):
    yield
    server.engine.script = TEXT
    assert server.idle()


def asked(server):
    """What the engine was asked for last."""
    return server.engine.requests[-1].asked


def test_a_conversation_is_answered(server):
    said = server.chat()
    assert said.object == "chat.completion" and said.model == MODEL and said.id.startswith("chatcmpl-")
    (choice,) = said.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.message.tool_calls is None and choice.logprobs is None
    prompt = server.server.processor.prompt(USER).tokens
    assert server.engine.requests[-1].prompt == prompt
    usage = said.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(TEXT.encode()) + 1)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_says_what_the_whole_says(server):
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None and chunk.choices for chunk in server.chat(stream=True))


def test_sampling_reaches_the_engine(server):
    server.chat(
        temperature=0.5, top_p=0.25, seed=7, n=3, frequency_penalty=0.5, presence_penalty=-1, logit_bias={"65": -100},
        max_completion_tokens=9, max_tokens=10, extra_body={"top_k": 5},
    )  # fmt: skip
    last = [one.asked for one in server.engine.requests[-3:]]
    assert [one["seed"] for one in last] == [7, 8, 9]
    for one in last:
        wanted = {"temperature": 0.5, "top_p": 0.25, "top_k": 5, "frequency_penalty": 0.5, "presence_penalty": -1.0,
                  "logit_bias": {65: -100.0}, "max_new_tokens": 9, "top_logprobs": 0}  # fmt: skip
        assert {name: one[name] for name in wanted} == wanted
        assert tuple(one["stop_ids"]) == server.server.tokenizer.stop_ids
    server.chat()
    assert asked(server)["temperature"] == 1.0 and asked(server)["top_p"] == 1.0 and asked(server)["top_k"] is None
    assert asked(server)["max_new_tokens"] == 8192 - len(server.engine.requests[-1].prompt)
    seeds = set()
    for _ in range(3):
        server.chat()
        seeds.add(asked(server)["seed"])
    assert len(seeds) == 3


def test_several_choices_come_whole_and_in_a_stream(server):
    server.engine.script = lambda handle: f"choice of seed {handle.asked['seed']}"
    wanted = [f"choice of seed {seed}" for seed in (4, 5, 6)]
    said = server.chat(n=3, seed=4)
    assert [choice.message.content for choice in said.choices] == wanted
    assert [choice.index for choice in said.choices] == [0, 1, 2]
    assert said.usage.prompt_tokens == len(server.engine.requests[-1].prompt)  # once
    texts = ["", "", ""]
    for chunk in server.chat(n=3, seed=4, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == wanted


def test_a_reply_that_is_cut_says_so(server):
    assert server.chat(max_tokens=3).choices[0].finish_reason == "length"
    assert server.chat(max_tokens=3).choices[0].message.content == "The"
    assert server.chat(max_tokens=1).choices[0].message.content == "T"


@pytest.mark.parametrize("stop", ["über", ["zzz", "brown", "fox"], "漢字"])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_reply(server, stop, stream):
    first = min(TEXT.index(one) for one in ([stop] if isinstance(stop, str) else stop) if one in TEXT)
    if stream:
        chunks = list(server.chat(stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT[:first]
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        (choice,) = server.chat(stop=stop).choices
        assert (choice.message.content, choice.finish_reason) == (TEXT[:first], "stop")


def test_messages_may_say_nothing(server):
    for content in ("", [], [{"type": "text", "text": ""}]):
        assert server.chat(messages=[{"role": "user", "content": content}]).choices[0].message.content == TEXT
    server.engine.script = ""
    (choice,) = server.chat().choices
    assert (choice.message.content, choice.finish_reason) == ("", "stop")
    assert [c.choices[0].finish_reason for c in server.chat(stream=True)][-1] == "stop"


def test_a_stop_string_frees_the_slot(server):
    server.engine.script = "stop here" + "." * 8000
    assert server.chat(stop="here").choices[0].message.content == "stop "
    assert server.idle() and len(server.engine.requests[-1].written) < 8000


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(server, stream):
    how = {"logprobs": True, "top_logprobs": 2, "stop": "fox"}
    if stream:
        chunks = [chunk.choices[0] for chunk in server.chat(stream=True, **how)]
        content = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
    else:
        content = server.chat(**how).choices[0].logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "The quick brown "
    assert content[0].token == "T" and content[0].logprob == -0.5
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert content[0].top_logprobs[0].token == "T"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(server, stream):
    server.engine.script = 'Let me look: [weather(city="Zürich"), clock()]'
    if stream:
        calls, text, reasons = {}, "", []
        for chunk in server.chat(tools=[TOOL, OTHER], stream=True):
            (choice,) = chunk.choices
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for call in choice.delta.tool_calls or []:
                assert call.id and call.type == "function"
                calls[call.index] = (call.function.name, call.function.arguments)
        calls = [calls[i] for i in range(len(calls))]
        assert reasons[-1] == "tool_calls"
    else:
        (choice,) = server.chat(tools=[TOOL, OTHER], parallel_tool_calls=True).choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        text = choice.message.content
        assert choice.finish_reason == "tool_calls"
        assert len({call.id for call in choice.message.tool_calls}) == 2
    assert text == "Let me look: "
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("weather", {"city": "Zürich"}),
        ("clock", {}),
    ]
    assert "weather" in server.server.tokenizer.decode(server.engine.requests[-1].prompt)


def test_the_client_s_own_helper_assembles_a_stream(server):
    server.engine.script = '[weather(city="Zürich")]'
    with server.client.chat.completions.stream(model=MODEL, messages=USER, tools=[TOOL]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == {"city": "Zürich"}


def test_no_tools_are_called_where_the_choice_is_none(server):
    server.engine.script = "[clock()]"
    (choice,) = server.chat(tools=[OTHER], tool_choice="none").choices
    assert (choice.message.content, choice.finish_reason) == ("[clock()]", "stop")
    assert "clock" not in server.server.tokenizer.decode(server.engine.requests[-1].prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_once_and_required_ones_at_least_once(server, stream):
    for seed in range(4):
        named = {"type": "function", "function": {"name": "weather"}}
        for choice, parallel in ((named, True), ("required", True), ("required", False)):
            how = {"tools": [OTHER, TOOL], "tool_choice": choice, "seed": seed, "parallel_tool_calls": parallel}
            if stream:
                with server.client.chat.completions.stream(model=MODEL, messages=USER, **how) as events:
                    said = events.get_final_completion().choices[0]
            else:
                said = server.chat(**how).choices[0]
            names = [call.function.name for call in said.message.tool_calls]
            assert said.finish_reason == "tool_calls" and not said.message.content
            assert names == ["weather"] if choice is named else names and set(names) <= {"weather", "clock"}
            assert parallel or len(names) == 1
            for call in said.message.tool_calls:
                arguments = json.loads(call.function.arguments)
                assert arguments.keys() == ({"city"} if call.function.name == "weather" else set())


def test_results_of_tools_are_put_in_the_order_of_the_calls(server):
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "clock", "arguments": "{}"}} for i in range(2)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"result {i}"} for i in range(2)]
    turns = [*USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    server.chat(messages=[*turns, *results], tools=[OTHER])
    in_order = server.engine.requests[-1].prompt
    server.chat(messages=[*turns, *reversed(results)], tools=[OTHER])
    assert server.engine.requests[-1].prompt == in_order
    with pytest.raises(openai.BadRequestError, match="is the id of no call before it: 'c9'") as error:
        server.chat(messages=[*turns, {**results[0], "tool_call_id": "c9"}], tools=[OTHER])
    assert error.value.param == "messages[2].tool_call_id"


@pytest.mark.parametrize("seed", range(3))
def test_json_is_json(server, seed):
    (choice,) = server.chat(response_format={"type": "json_object"}, seed=seed).choices
    assert isinstance(json.loads(choice.message.content), dict) and choice.finish_reason == "stop"
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
    (choice,) = server.chat(response_format=form, seed=seed, n=1).choices
    assert json.loads(choice.message.content).keys() == {"city"}
    said = server.chat(response_format=form, seed=seed, n=2)
    assert [json.loads(choice.message.content).keys() for choice in said.choices] == [{"city"}] * 2
    text = {"type": "text"}
    assert server.chat(response_format=text).choices[0].message.content == TEXT


def test_strict_tools_are_called_as_they_are_declared_or_text_is_written(server):
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    for seed in range(6):
        message = server.chat(tools=[strict], seed=seed, max_tokens=200).choices[0].message
        for call in message.tool_calls or ():
            assert json.loads(call.function.arguments).keys() == {"city"}


def data_url(size=(28, 28), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(url, **more):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, **more}}]}]


def test_pictures_come_as_data_urls(server):
    server.chat(messages=picture(data_url(), detail="auto"))
    assert asked(server)["tiles"].shape == (1, 28, 28, 3)
    assert (asked(server)["tiles"] == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (picture("http://example.com/a.png"), "nothing is fetched from the network"),
        (picture("file:///etc/passwd"), "this server opens none"),
        (picture("/etc/passwd"), "this server opens none"),
        (picture("../../etc/passwd"), "this server opens none"),
        ([{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}], "this server opens none"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has no picture"),
        (picture("data:image/png;base64,%%%"), "damaged"),
        (picture("data:image/png;base64,aGVsbG8="), "is not a picture that can be read"),
        (picture(data_url(), detail="low"), "may be auto or high"),
        (picture(data_url()) * 17, "may have 16"),
    ],
)
def test_pictures_that_are_refused(server, messages, said):
    with pytest.raises(openai.BadRequestError) as error:
        server.chat(messages=messages)
    assert said in error.value.message and error.value.param.startswith("messages"), error.value.body
    assert "root:" not in error.value.message


@pytest.mark.parametrize(
    "harmless",
    [
        {"store": False}, {"service_tier": "auto"}, {"modalities": ["text"]}, {"user": "me"}, {"metadata": {"a": "b"}},
        {"frequency_penalty": 0}, {"presence_penalty": 0}, {"logprobs": False}, {"logit_bias": {}}, {"stop": None},
        {"tools": [], "tool_choice": "auto"}, {"tool_choice": "none"}, {"n": 1}, {"stream": False}, {"stop": []},
        {"tools": [OTHER], "tool_choice": "auto"}, {"seed": -1}, {"top_p": 1}, {"safety_identifier": "x"},
        {"extra_body": {"min_p": 0.0, "repetition_penalty": 1, "best_of": 1, "nothing_known": None}},
        {"prompt_cache_key": "k"}, {"temperature": 0}, {"tools": None}, {"reasoning_effort": "none"},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_taken(server, harmless):
    assert server.chat(**harmless).choices[0].message.content == TEXT


BAD = [
    ({"store": True}, "store"), ({"service_tier": "flex"}, "service_tier"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": "warm"}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"), ({"n": 33}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"frequency_penalty": 3}, "frequency_penalty"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"320": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"), ({"stop": [""]}, "stop[0]"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": "x" * 257}, "stop"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"modalities": ["audio"]}, "modalities"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"), ({"seed": 1.5}, "seed"),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "tools[1]"), ({"tools": [{"type": "web"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": [TOOL], "tool_choice": "must"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"), ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
     "response_format"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"), ({"extra_body": {"mirostat": 2}}, "mirostat"),
    ({"extra_body": {"best_of": 3}}, "best_of"), ({"extra_body": {"min_p": 0.1}}, "min_p"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"web_search_options": {}}, "web_search_options"),
    ({"metadata": {"a": 1}}, "metadata"), ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda x: json.dumps(x)[:50] if isinstance(x, dict) else x)
def test_what_cannot_be_done_is_a_400_that_names_the_field(server, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        server.chat(**fields)
    assert error.value.status_code == 400 and error.value.param == param, error.value.body
    assert error.value.type == "invalid_request_error" and len(error.value.message) < 700


def test_too_long_is_a_413_with_the_numbers(server):
    with pytest.raises(openai.APIStatusError) as error:
        server.chat(max_tokens=8192)
    assert error.value.status_code == 413 and error.value.code == "context_length_exceeded"
    prompt = len(server.server.processor.prompt(USER).tokens)
    for number in (prompt, 8192, prompt + 8192):
        assert str(number) in error.value.message
    with pytest.raises(openai.APIStatusError) as error:
        server.chat(messages=[{"role": "user", "content": "x" * 9000}])
    assert error.value.status_code == 413 and error.value.param == "messages"
    # up to the last token it is taken
    server.chat(max_tokens=8192 - prompt)


def test_another_model_is_a_404(server):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'") as error:
        server.chat(model="gpt-5")
    assert error.value.code == "model_not_found"
    assert server.client.models.retrieve(MODEL).id == MODEL
    assert [model.id for model in server.client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError):
        server.client.embeddings.create(model=MODEL, input="x")


def complete(server, **fields):
    return server.client.completions.create(**{"model": MODEL, "prompt": "Once", **fields})


def test_a_prompt_is_continued(server):
    said = complete(server, max_tokens=9)
    assert said.object == "text_completion" and said.choices[0].text == "The quick"
    assert said.choices[0].finish_reason == "length" and said.choices[0].logprobs is None
    tokenizer = server.server.tokenizer
    assert server.engine.requests[-1].prompt == [tokenizer.bos_id, *b"Once"]
    assert len(complete(server).choices[0].text) == 16  # OpenAI's default
    assert "".join(chunk.choices[0].text for chunk in complete(server, stream=True, max_tokens=100)) == TEXT
    assert complete(server, stop="quick").choices[0].text == "The "
    assert complete(server, prompt="", max_tokens=3).choices[0].text == "The"


@pytest.mark.parametrize("prompt", [["a", "b"], [[97], [98]]])
def test_several_prompts_are_answered_in_order(server, prompt):
    server.engine.script = lambda handle: f"{handle.prompt[-1]} {handle.asked['seed']}"
    said = complete(server, prompt=prompt, n=2, seed=1)
    assert [choice.text for choice in said.choices] == ["97 1", "97 2", "98 1", "98 2"]
    assert said.usage.prompt_tokens == sum(len(one.prompt) for one in server.engine.requests[-4::2])


@pytest.mark.parametrize("stream", [False, True])
def test_scores_of_a_prompt_as_harnesses_ask_for_them(server, stream):
    """Tokens, echo, and one new token or none."""
    for new in (0, 1):
        how = {"prompt": [1, *b"abc"], "echo": True, "logprobs": 2, "max_tokens": new}
        if stream:
            chunks = [chunk.choices[0] for chunk in complete(server, stream=True, **how)]
            text = "".join(choice.text for choice in chunks)
            parts = [choice.logprobs for choice in chunks if choice.logprobs]
            tokens, scores, offsets, tops = (
                [one for part in parts for one in getattr(part, name)]
                for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
            )
        else:
            (choice,) = complete(server, **how).choices
            text, found = choice.text, choice.logprobs
            tokens, scores, offsets, tops = found.tokens, found.token_logprobs, found.text_offset, found.top_logprobs
        assert text == "\x01abc" + "T" * new
        assert tokens == ["\x01", "a", "b", "c", "T"][: 4 + new]
        assert scores == [None, -0.5, -0.5, -0.5, -0.5][: 4 + new]
        assert offsets == [0, 1, 2, 3, 4][: 4 + new]
        assert tops[0] is None and tops[1] == {"a": -0.5, "b": -1.5}
    assert asked(server)["prompt_scores"]


def test_scores_of_a_text_leave_out_the_token_that_it_did_not_say(server):
    (choice,) = complete(server, prompt="aé", echo=True, logprobs=0, max_tokens=0).choices
    assert choice.text == "aé" and choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.token_logprobs == [-0.5] * 3 and choice.logprobs.top_logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"), ({"prompt": []}, "prompt"), ({"prompt": [["a"]]}, "prompt[0]"),
        ({"prompt": [[1], []]}, "prompt[1]"), ({"prompt": [320]}, "prompt"), ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"), ({"max_tokens": -1}, "max_tokens"), ({"best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 20, "n": 2}, "n"), ({"prompt": [10**400]}, "prompt"), ({"echo": 1}, "echo"),
        ({"extra_body": {"messages": []}}, "messages"), ({"extra_body": {"prompt": {"a": 1}}}, "prompt"),
    ],
)  # fmt: skip
def test_completions_that_are_refused(server, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        complete(server, **fields)
    assert error.value.param == param, error.value.body


def test_text_becomes_tokens_and_comes_back(server):
    def ask(path, **body):
        status, _, answer = server.request("POST", path, body)
        return status, json.loads(answer)

    status, said = ask("/tokenize", model=MODEL, prompt="hé")
    tokenizer = server.server.tokenizer
    assert status == 200 and said["tokens"] == [tokenizer.bos_id, *"hé".encode()]
    assert said["count"] == 4 and said["max_model_len"] == 8192
    assert ask("/tokenize", prompt="h", add_special_tokens=False)[1]["tokens"] == [104]
    assert ask("/tokenize", messages=USER)[1]["tokens"] == server.server.processor.prompt(USER).tokens
    assert ask("/tokenize", prompt="é", return_token_strs=True)[1]["token_strs"][1:] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert ask("/detokenize", tokens=[104, 195, 169])[1] == {"prompt": "hé"}
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": USER}), ("/detokenize", {"tokens": [320]}),
        ("/detokenize", {"tokens": "a"}), ("/detokenize", {"tokens": [], "x": 1}),
    ):  # fmt: skip
        status, said = ask(path, **body)
        assert status == 400 and said["error"]["message"], said


def test_figures_have_vllms_names(server):
    server.chat()
    status, headers, text = server.request("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    figures = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    for name in (
        "num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
    ):  # fmt: skip
        assert not math.isnan(float(figures[f'vllm:{name}{{model_name="{MODEL}"}}']))
    assert float(figures[f'vllm:request_success_total{{finished_reason="stop",model_name="{MODEL}"}}']) > 0
    assert float(figures[f'vllm:generation_tokens_total{{model_name="{MODEL}"}}']) > len(TEXT)


def test_a_full_queue_is_a_429_that_says_when_to_try_again():
    with serving(slots=1, max_waiting=1, delay=0.02) as found:
        streams = [found.chat(stream=True, max_tokens=2000) for _ in range(2)]
        next(iter(streams[0]))
        with pytest.raises(openai.RateLimitError) as error:
            found.chat()
        assert error.value.response.headers["retry-after"] == "1" and error.value.code == "queue_full"
        with pytest.raises(openai.RateLimitError):  # of several choices none is begun
            found.chat(n=2)
        for stream in streams:
            stream.close()
        assert found.idle()
        assert found.chat(max_tokens=2).choices[0].finish_reason == "length"


def test_an_engine_that_dies_fails_everybody_and_health():
    with serving(delay=0.02) as found:
        assert found.request("GET", "/health")[0] == found.request("GET", "/ready")[0] == 200
        stream = iter(found.chat(stream=True))
        next(stream)
        found.engine.die(RuntimeError("the device was lost"))
        with pytest.raises(openai.APIError, match="the engine has died"):
            for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="the engine has died"):
            found.chat()
        assert found.request("GET", "/health")[0] == found.request("GET", "/ready")[0] == 500


def test_a_request_alone_may_fail():
    class Fails(FakeEngine):
        def _step(self, handle):
            if handle.asked["seed"] == 3:
                self._running.remove(handle)
                handle.tell([], error=FloatingPointError("its logits are no numbers"))
            else:
                super()._step(handle)

    with serving(engine=Fails(ByteTokenizer(), script=TEXT)) as found:
        with pytest.raises(openai.InternalServerError, match="its logits are no numbers"):
            found.chat(seed=3)
        assert found.chat(seed=4).choices[0].message.content == TEXT
