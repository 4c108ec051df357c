"""Python's clients of OpenAI's API, each by its ordinary use. A client that is not installed is skipped."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest

from tests.clients.conftest import MODEL

pytestmark = pytest.mark.clients
QUESTION: Any = [{"role": "user", "content": "Where do llamas live?"}]
TOO_LONG = "llama " * 5000
NO_KEY = "none"


# ---- LiteLLM ----


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network for prices
    module = pytest.importorskip("litellm")
    module.suppress_debug_info = True
    return module


def test_litellm_answers_and_streams(litellm: Any, url: str) -> None:
    settings: Any = {"messages": QUESTION, "max_tokens": 8, "api_base": url, "api_key": NO_KEY}
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.completion(model=f"{provider}/{MODEL}", **settings)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens <= 8
    chunks = litellm.completion(
        model=f"openai/{MODEL}", stream=True, stream_options={"include_usage": True}, **settings
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert asyncio.run(litellm.acompletion(model=f"openai/{MODEL}", **settings)).choices[0].message.content


def test_litellm_completes_texts_and_responds(litellm: Any, url: str) -> None:
    ask: Any = {"api_base": url, "api_key": NO_KEY}
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="A llama", max_tokens=8, temperature=0, **ask
    )
    assert text.choices[0].text
    response = litellm.responses(model=f"openai/{MODEL}", input="hi", max_output_tokens=8, **ask)
    assert response.output[0].content[0].text


def test_litellm_passes_its_options_on(litellm: Any, url: str) -> None:
    options: Any = {
        **{"max_tokens": 8, "temperature": 0.3, "top_p": 0.9, "seed": 3, "n": 2, "stop": ["never"], "user": "me"},
        **{"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": True, "top_logprobs": 2},
        **{"parallel_tool_calls": True, "api_base": url, "api_key": NO_KEY},
    }
    dialog = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *QUESTION]
    assert len(litellm.completion(model=f"openai/{MODEL}", messages=dialog, **options).choices) == 2


def test_litellm_raises_its_own_errors(litellm: Any, url: str) -> None:
    ask: Any = {"api_base": url, "api_key": NO_KEY, "max_retries": 0}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model=f"openai/{MODEL}", messages=[{"role": "user", "content": TOO_LONG}], **ask)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/another", messages=QUESTION, **ask)


# ---- LangChain ----


@pytest.fixture
def chat_openai(url: str) -> Any:
    module = pytest.importorskip("langchain_openai")

    def make(**settings: Any) -> Any:
        return module.ChatOpenAI(**{"model": MODEL, "base_url": url, "api_key": NO_KEY, "max_tokens": 8, **settings})

    return make


def test_langchain_answers_streams_and_batches(chat_openai: Any) -> None:
    assert chat_openai().invoke("hi").content
    assert "".join(chunk.content for chunk in chat_openai(stream_usage=True).stream("hi"))
    assert all(answer.content for answer in chat_openai().batch(["a", "b", "c"]))
    assert asyncio.run(chat_openai().ainvoke("hi")).content
    found = chat_openai().bind(logprobs=True, top_logprobs=2).invoke("hi").response_metadata["logprobs"]["content"]
    assert len(found[0]["top_logprobs"]) == 2


def test_langchain_sends_dialogs(chat_openai: Any) -> None:
    messages = pytest.importorskip("langchain_core.messages")
    human, system, ai = messages.HumanMessage, messages.SystemMessage, messages.AIMessage
    dialog = [system("a"), system("b"), human("hi", name="bob"), ai("x"), human("y")]
    assert chat_openai().invoke([*dialog, human([{"type": "text", "text": "z"}])]).content
    first = chat_openai().invoke("hi")
    assert chat_openai().invoke([human("hi"), first, human("more")]).content
    many = chat_openai(temperature=0.2, top_p=0.5, seed=1, n=2, presence_penalty=0, stop=["never"], metadata={"a": "b"})
    assert len(many.generate([[human("hi")]]).generations[0]) == 2


def test_langchain_chains_a_prompt(chat_openai: Any) -> None:
    prompts = pytest.importorskip("langchain_core.prompts")
    parsers = pytest.importorskip("langchain_core.output_parsers")
    prompt = prompts.ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])
    assert (prompt | chat_openai() | parsers.StrOutputParser()).invoke({"question": "hi"})


def test_langchain_uses_the_responses_api(chat_openai: Any) -> None:
    assert chat_openai(use_responses_api=True).invoke("hi").content[0]["text"]
    assert len(list(chat_openai(use_responses_api=True).stream("hi"))) > 2


def test_langchain_completes_texts(url: str) -> None:
    llm = pytest.importorskip("langchain_openai").OpenAI(
        model=MODEL, base_url=url, api_key=NO_KEY, max_tokens=8, temperature=0
    )
    assert llm.invoke("A llama")
    assert "".join(llm.stream("A llama"))


def test_langchain_raises_its_own_error_for_a_full_context(chat_openai: Any) -> None:
    exceptions = pytest.importorskip("langchain_core.exceptions")
    with pytest.raises(exceptions.ContextOverflowError):
        chat_openai().invoke(TOO_LONG)


# ---- pydantic-ai ----


@pytest.fixture
def pydantic_ai(url: str) -> Any:
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    provider = pytest.importorskip("pydantic_ai.providers.openai").OpenAIProvider(base_url=url, api_key=NO_KEY)

    def make(kind: str = "OpenAIChatModel", **options: Any) -> Any:
        model = getattr(models, kind)(MODEL, provider=provider)
        options = options or {"system_prompt": "a", "instructions": "b", "model_settings": {"max_tokens": 8}}
        return ai.Agent(model, **options)

    return make


def test_pydantic_ai_runs_goes_on_and_streams(pydantic_ai: Any) -> None:
    agent = pydantic_ai()
    first = agent.run_sync("hi")
    assert first.output
    assert agent.run_sync("more", message_history=first.all_messages()).output

    async def stream() -> list[str]:
        async with agent.run_stream("hi") as run:
            return [text async for text in run.stream_text(delta=True)]

    assert "".join(asyncio.run(stream()))


def test_pydantic_ai_passes_its_settings_on(pydantic_ai: Any) -> None:
    settings: Any = {
        **{"temperature": 0.1, "top_p": 0.9, "seed": 1, "presence_penalty": 0, "frequency_penalty": 0},
        **{"parallel_tool_calls": False, "stop_sequences": ["never"], "extra_body": {"top_k": -1}},
    }
    assert pydantic_ai().run_sync("hi", model_settings=settings).output


def test_pydantic_ai_uses_the_responses_api(pydantic_ai: Any) -> None:
    assert pydantic_ai("OpenAIResponsesModel").run_sync("hi").output


# ---- instructor, and others that ask for an object ----


@pytest.fixture
def animal() -> Any:
    """An object that the toy cannot miss within a few tokens."""
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")
    config = pydantic.ConfigDict(extra="forbid")  # else the toy goes on with properties of its own
    fields: Any = {"name": (Literal["llama", "alpaca"], ...), "legs": (Literal[2, 4], ...)}
    return pydantic.create_model("Animal", __config__=config, **fields)


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "JSON"])
def test_instructor_gets_an_object(url: str, animal: Any, mode: str) -> None:
    instructor, openai = pytest.importorskip("instructor"), pytest.importorskip("openai")
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=NO_KEY), mode=instructor.Mode[mode])
    ask: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 400}
    assert client.chat.completions.create(response_model=None, **ask).choices[0].message.content
    if mode == "JSON_SCHEMA":  # the other one asks for any JSON object, which the toy writes as it likes
        assert client.chat.completions.create(response_model=animal, max_retries=1, **ask).legs in (2, 4)


def test_others_get_an_object_too(url: str, animal: Any, chat_openai: Any) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url, api_key=NO_KEY)
    parsed = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=animal)
    assert parsed.choices[0].message.parsed.legs in (2, 4)
    response = client.responses.parse(model=MODEL, input="hi", text_format=animal)
    assert response.output_parsed.legs in (2, 4)
    structured = chat_openai(max_tokens=400).with_structured_output(animal, method="json_schema")
    assert structured.invoke("hi").legs in (2, 4)


def test_pydantic_ai_gets_an_object(pydantic_ai: Any, animal: Any) -> None:
    native = pytest.importorskip("pydantic_ai").NativeOutput(animal)
    assert pydantic_ai(output_type=native).run_sync("hi").output.legs in (2, 4)


# ---- LlamaIndex ----


@pytest.fixture
def llama_index(url: str) -> Any:
    module = pytest.importorskip("llama_index.llms.openai_like")

    def make(*, is_chat: bool = True) -> Any:
        return module.OpenAILike(
            model=MODEL, api_base=url, api_key=NO_KEY, is_chat_model=is_chat, max_tokens=8, temperature=0
        )

    return make


def test_llama_index_chats_and_completes(llama_index: Any) -> None:
    message = pytest.importorskip("llama_index.core.llms").ChatMessage
    dialog = [message(role="system", content="a"), message(role="user", content="hi")]
    assert llama_index().chat(dialog).message.content
    assert "".join(chunk.delta or "" for chunk in llama_index().stream_chat(dialog))
    assert asyncio.run(llama_index().achat(dialog)).message.content
    assert llama_index().complete("hi").text
    assert llama_index(is_chat=False).complete("A llama").text
    assert "".join(chunk.delta or "" for chunk in llama_index(is_chat=False).stream_complete("A llama"))


# ---- AutoGen ----


def test_autogen_runs_an_agent_and_a_team(url: str) -> None:
    models = pytest.importorskip("autogen_ext.models.openai")
    agents, teams, conditions = (
        pytest.importorskip(f"autogen_agentchat.{name}") for name in ("agents", "teams", "conditions")
    )
    can = dict.fromkeys(("vision", "function_calling", "json_output", "structured_output"), False)
    info = can | {"family": "unknown"}

    async def run() -> tuple[str, int]:
        client = models.OpenAIChatCompletionClient(
            model=MODEL, base_url=url, api_key=NO_KEY, max_tokens=8, model_info=info
        )
        agent = agents.AssistantAgent("assistant", model_client=client, system_message="x")
        await agent.run(task="hi")
        answer = (await agent.run(task="more")).messages[-1].content
        members = [agents.AssistantAgent(name, model_client=client, model_client_stream=True) for name in "ab"]
        team = teams.RoundRobinGroupChat(members, termination_condition=conditions.MaxMessageTermination(5))
        events = [event async for event in team.run_stream(task="hi")]
        await client.close()
        return answer, len(events[-1].messages)

    answer, n_messages = asyncio.run(run())
    assert answer
    assert n_messages == 5


# ---- openai-agents ----


@pytest.mark.parametrize("kind", ["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def test_openai_agents_run_and_stream(url: str, kind: str) -> None:
    agents, openai = pytest.importorskip("agents"), pytest.importorskip("openai")
    agents.set_tracing_disabled(True)

    async def run() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=NO_KEY) as client:
            model = getattr(agents, kind)(MODEL, client)
            agent = agents.Agent(name="x", instructions="y", model=model)
            whole = await agents.Runner.run(agent, "hi")
            streamed = agents.Runner.run_streamed(agent, "hi")
            async for _ in streamed.stream_events():
                pass
            return whole.final_output, streamed.final_output

    assert all(asyncio.run(run()))


# ---- llm ----


def test_llm_prompts_and_converses(url: str) -> None:
    plugin = pytest.importorskip("llm.default_plugins.openai_models")
    model = plugin.Chat(MODEL, model_name=MODEL, api_base=url)
    model.key = NO_KEY
    assert model.prompt("hi", max_tokens=8).text()
    conversation = model.conversation()
    assert conversation.prompt("hi", system="s", max_tokens=8, stream=False).text()
    assert conversation.prompt("more", max_tokens=8).text()
