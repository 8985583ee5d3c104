"""The server over the real engine and a model that learned nothing: what comes over HTTP is what the model says."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import openai
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from micro_run import picture_model, picture_processor
from PIL import Image
from random_schemas import SCHEMAS
from serving import USER, crowd, serving, wait_until

from llama4_jax import generate
from llama4_jax.configs import load_config
from llama4_jax.infer.engine import Engine
from llama4_jax.inputs.tool_calls import parse_reply
from llama4_jax.mesh_search import Work
from llama4_jax.plan_server import plan_server
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import topology

SMALL = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    return picture_model()


@pytest.fixture(scope="module")
def server(model):
    processor = picture_processor()
    engine = Engine(model, processor, slots=4, context=2048, max_waiting=64)
    with serving(processor=processor, engine=engine) as found:
        yield found


def alone(model, server, messages, new, **sampling):
    """What `generate` gives for that conversation, as text."""
    prompt = server.server.processor.prompt(messages)
    tokenizer = server.server.tokenizer
    (ids,) = generate(
        model, [prompt.tokens], images=[prompt.tiles], max_new_tokens=new, stop_ids=tokenizer.stop_ids, **sampling
    )
    return tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids], skip_special=True)


def said(number):
    return [{"role": "user", "content": f"message {number} " * (number % 5 + 1)}]


def test_the_likeliest_reply_is_that_of_generate_whoever_else_asks(model, server):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        replies = list(
            pool.map(
                lambda i: server.chat(messages=said(i), temperature=0, max_tokens=12 + i % 7, stream=False), range(12)
            )
        )
    for i in (0, 5, 11):
        assert replies[i].choices[0].message.content == alone(model, server, said(i), 12 + i % 7)


def test_a_seed_reproduces_a_reply_and_another_gives_another(server):
    def ask(seed):
        return server.chat(seed=seed, temperature=1.0, max_tokens=24).choices[0].message.content

    assert ask(1) == ask(1) != ask(2)


def test_log_probabilities_are_those_of_the_model(model, server):
    prompt = [256, *b"a text of some length"]
    asked = {"prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 0, "model": "tiny"}
    found = server.client.completions.create(**asked).choices[0].logprobs
    logits = np.asarray(jax.jit(model)(jnp.array([prompt], jnp.int32)), np.float64)[0]
    logits -= logits.max(-1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found.token_logprobs[0] is None
    wanted = [expected[i, token] for i, token in enumerate(prompt[1:])]
    np.testing.assert_allclose(found.token_logprobs[1:], wanted, atol=2e-5)
    assert all(len(top) == 3 for top in found.top_logprobs[1:])
    assert max(found.top_logprobs[1].values()) == pytest.approx(expected[0].max(), abs=2e-5)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8))


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def test_pictures_are_seen(model, server):
    messages = [{"role": "user", "content": [data_url(picture())]}]
    reply = server.chat(messages=messages, temperature=0, max_tokens=12).choices[0].message.content
    assert reply == alone(model, server, messages, 12)
    # The same words with another picture are another prompt, of which nothing is taken from the first.
    other = [{"role": "user", "content": [data_url(picture(1))]}]
    again = server.chat(messages=other, temperature=0, max_tokens=12)
    assert again.choices[0].message.content == alone(model, server, other, 12)


@pytest.mark.parametrize("seed", range(3))
def test_grammars_hold_a_model_that_knows_nothing(server, seed):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SMALL, "strict": True}}
    reply = server.chat(response_format=form, seed=seed, temperature=1.5, max_tokens=400)
    value = json.loads(reply.choices[0].message.content)
    assert value.keys() == {"a", "b"} and value["b"] in ("x", "y") and isinstance(value["a"], bool)
    tool = {"type": "function", "function": {"name": "f", "parameters": SMALL}}
    reply = server.chat(tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=400)
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"a", "b"}
    assert parse_reply(f"[f(**{call.function.arguments})]").tool_calls


def every_reply_is_valid(server, count):
    """Asks for so many random schemas, each once, four at a time. A reply of a model that knows nothing ends sooner
    if what closes something is likelier."""
    draws: list[tuple[dict, int]] = []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(SCHEMAS, st.integers(0, 10**6))
    def draw(schema, seed):
        draws.append((schema, seed))

    draw()
    bias = {str(token): 6 for token in (*b'",}]', *server.server.tokenizer.stop_ids)}

    def ask(drawn):
        schema, seed = drawn
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        choice = server.chat(response_format=form, seed=seed, logit_bias=bias, max_tokens=1500).choices[0]
        assert choice.finish_reason == "stop", (schema, choice.message.content[-200:])
        jsonschema.validate(json.loads(choice.message.content), schema, jsonschema.Draft202012Validator)
        return len(choice.message.content)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(ask, draws))
    assert len(lengths) >= count * 0.9  # some were drawn twice
    assert max(lengths) > 20


def test_replies_are_valid_by_random_schemas(server):
    every_reply_is_valid(server, 15)


@pytest.mark.slow
def test_replies_are_valid_by_many_random_schemas(server):
    every_reply_is_valid(server, 300)


def test_a_client_that_goes_away_frees_its_slot(server):
    # Nothing of the vocabulary's end is likely enough to end these by itself.
    bias = {str(token): -100 for token in server.server.tokenizer.stop_ids}
    body = {"messages": USER, "logit_bias": bias, "max_tokens": 1900}
    connections = [server.post("/v1/chat/completions", {**body, "stream": i % 2 == 0}) for i in range(10)]
    connections.append(server.post("/v1/chat/completions", {**body, "messages": said(4) * 25, "max_tokens": 9}))
    for connection in connections:  # the last while its prompt is read
        connection.close()
    assert wait_until(lambda: server.idle(0.01), 10)
    assert server.chat(max_tokens=3).usage.completion_tokens <= 3


@pytest.mark.slow
def test_200_clients_on_8_slots_of_whom_a_fifth_goes_away_harm_nobody(model):
    """For 30 seconds: everyone who stays gets what the same request got alone, no slot is lost, and memory is flat."""
    processor = picture_processor()
    engine = Engine(model, processor, slots=8, context=2048, max_waiting=512)
    bias = {str(token): -100 for token in processor.tokenizer.stop_ids}
    with serving(processor=processor, engine=engine) as found:
        asked = []
        for i in range(48):
            body = {"messages": said(i), "seed": i, "temperature": (0, 0.7, 1.3)[i % 3], "max_tokens": 5 + i % 40}
            if i % 4 == 0:
                body["logit_bias"] = bias
            asked.append((body, found.chat(**body).choices[0].message.content))
        was = crowd(found, lambda draw: draw.choice(asked), clients=200, seconds=30, patience=1.0)
        print(f"{was.answered} answered, {was.gone} gone, {was.grown / 2**20:.1f} MiB grown")
        assert not was.wrong, was.wrong[:3]
        assert was.answered > 500 and was.gone > 100
        assert found.idle() and wait_until(lambda: found.server.active == 0 and found.server.bodies == 0)
        assert was.grown < 48 * 2**20
        everyone = [found.post("/v1/chat/completions", {"messages": USER, "logit_bias": bias, "max_tokens": 1900})
                    for _ in range(9)]  # fmt: skip
        assert wait_until(lambda: (found.engine.stats.running, found.engine.stats.waiting) == (8, 1))
        for connection in everyone:
            connection.close()
        assert found.idle()


def test_figures_are_the_engine_s(server):
    server.chat(max_tokens=2)
    figures = server.request("GET", "/metrics")[2].decode()
    assert (
        'llama4:slots{model_name="tiny"} 4.0' in figures and 'vllm:num_requests_running{model_name="tiny"}' in figures
    )


def test_what_was_read_before_is_said(server):
    messages = [{"role": "user", "content": "a long question " * 30}]
    first, second = (server.chat(messages=messages, temperature=0, max_tokens=4) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert 0 < second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens


def test_a_stop_string_ends_what_runs(server):
    text = server.chat(temperature=0, max_tokens=40).choices[0].message.content
    stop = text[8:11]
    reply = server.chat(temperature=0, max_tokens=40, stop=stop).choices[0]
    assert reply.message.content == text[: text.index(stop)] and reply.finish_reason == "stop"


def test_no_request_compiles_anything(server):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    server.chat(max_tokens=4)
    server.chat(max_tokens=5, temperature=0.3, top_p=0.5, seed=9, n=2, frequency_penalty=1, logit_bias={"65": 5},
                logprobs=True, top_logprobs=4, extra_body={"top_k": 3})  # fmt: skip
    server.chat(max_tokens=40, response_format={"type": "json_object"})
    tool = {"type": "function", "function": {"name": "f", "parameters": SMALL}}
    server.chat(max_tokens=9, tools=[tool], tool_choice="required", n=3, temperature=0, logprobs=True)
    server.chat(messages=said(4) * 20, max_tokens=3, stop=["zz"], presence_penalty=-1)
    for size in ((28, 28), (60, 90), (200, 20)):
        server.chat(messages=[{"role": "user", "content": [data_url(Image.new("RGB", size)), data_url(picture())]}])
    server.client.completions.create(model="tiny", prompt=["a" * 200, "b"], echo=True, logprobs=1, max_tokens=2)
    server.client.completions.create(model="tiny", prompt=[5, 6, 7], echo=True, logprobs=20, max_tokens=0)
    assert compiled == []


def test_the_planner_knows_what_an_engine_holds(model, server):
    config = dataclasses.replace(load_config("tiny"), model=model.config, precision=model.precision)
    mesh, h100 = MeshConfig(data=1), topology("h100:1")
    parts = plan_server(Work(config, "decode", rows=4, context=2048), mesh, h100).parts
    held = {"cache, global layers": 0, "cache, chunked layers": 0}
    for spec, layer in zip(model.config.layers, server.engine._core._cache.layers, strict=True):
        kind = "cache, global layers" if spec.chunk is None else "cache, chunked layers"
        held[kind] += sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
    assert all(held.values()) and {name: parts[name] for name in held} == held
    rows = sum(leaf.nbytes for leaf in jax.tree.leaves(server.engine._core._rows))
    assert parts["rows: settings, counts of tokens"] == rows


def test_a_stop_string_ends_json_and_others_keep_their_grammar(server):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SMALL, "strict": True}}

    def ask(stop):
        return server.chat(response_format=form, seed=5, stop=stop, max_tokens=400).choices[0]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole, cut = pool.map(ask, ([], ['"b"']))
    text = whole.message.content
    assert json.loads(text).keys() == {"a", "b"} and whole.finish_reason == cut.finish_reason == "stop"
    assert cut.message.content == text[: text.index('"b"')]
    assert server.idle()


NORMAL = [f"message {i} " * (i % 3 + 1) for i in range(8)]


@contextlib.contextmanager
def numbers_that_are_none(server):
    """As of a broken weight, or an overflow: the embedding of one token, which stands in BROKEN alone, is NaN."""
    engine, core = server.engine, server.engine._core
    sound, flat = core._state, dict(nnx.to_flat_state(core._state))
    path = next(path for path, variable in flat.items() if variable.shape[0] == engine.config.vocab_size)
    broken = flat[path].replace(flat[path].get_value().at[7].set(jnp.nan))
    engine.forget()
    core._state = nnx.from_flat_state({**flat, path: broken})
    try:
        yield
    finally:
        assert server.idle()
        core._state = sound
        engine.forget()


BROKEN = "\x07 breaks " * 30


def greedy(server, text, new=30):
    messages = [{"role": "user", "content": text}]
    reply = server.chat(messages=messages, temperature=0, max_tokens=new, logprobs=True).choices[0]
    return reply.message.content, [entry.logprob for entry in reply.logprobs.content]


def test_a_prompt_whose_numbers_are_none_harms_nobody_beside_it(server):
    wanted = [greedy(server, text) for text in NORMAL]
    with numbers_that_are_none(server), concurrent.futures.ThreadPoolExecutor(4) as pool:
        bad = pool.submit(greedy, server, BROKEN, 1200)
        assert wait_until(lambda: server.engine.stats.running == 1)
        assert list(pool.map(lambda text: greedy(server, text), NORMAL)) == wanted
        assert bad.exception().status_code == 500 and "NaN" in bad.exception().message


def test_a_prompt_whose_numbers_are_none_harms_nobody_who_has_its_slot_next(server):
    wanted = [greedy(server, text) for text in NORMAL]
    with numbers_that_are_none(server), concurrent.futures.ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(greedy, server, BROKEN) for _ in range(4)]:
            assert one.exception() is not None
        assert [greedy(server, text) for text in NORMAL] == wanted


def test_a_prompt_that_fills_the_context_is_answered_by_one_token(server):
    prompt = [256, *b"x" * 2046]
    reply = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert reply.usage.completion_tokens == 1
    with pytest.raises(openai.APIStatusError) as error:
        server.client.completions.create(model="tiny", prompt=[*prompt, 1], max_tokens=1)
    assert error.value.status_code == 413


def test_when_the_engine_dies_everybody_is_told(server):
    """The last test of this file: the engine is dead afterwards."""

    def fails():
        raise RuntimeError("the device was lost")

    connection = server.post("/v1/chat/completions", {"messages": USER, "max_tokens": 1900, "stream": True})
    assert b"200 OK" in connection.recv(1000)
    server.engine._core.turn = fails
    with pytest.raises(openai.InternalServerError, match="the engine has died"):
        server.chat(max_tokens=1900)
    data = b""
    while b"[DONE]" not in data:
        data += connection.recv(65536)
    connection.close()
    assert b"the engine has died" in data
    assert server.request("GET", "/health")[0] == server.request("GET", "/ready")[0] == 500
