"""What clients of OpenAI's protocol get of serve.py, each as its users write it (docs/clients.md).

    pip install openai langchain-openai litellm llama-index-llms-openai-like
    python tests/long_clients.py MODEL [openai langchain llamaindex litellm curl]

Starts the server with the model, a folder such as SmolLM2-135M-Instruct, and prints what each call
gave. A client that is not installed is passed over. It ends with how many calls failed."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is the weather in Paris?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather in a city", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}


class Show:
    """Prints what each call gave, and counts those that failed."""

    def __init__(self):
        self.n_calls = 0
        self.failed = []
        self.client = ""

    def __call__(self, what, f):
        self.n_calls += 1
        begun = time.perf_counter()
        try:
            result = f()
            if asyncio.iscoroutine(result):
                result = asyncio.run(result)
        except Exception as error:
            self.failed.append(f"{self.client}: {what}")
            result = f"FAILED: {type(error).__name__}: {error}"
        seconds = time.perf_counter() - begun
        print(f"{what} ({seconds:.1f} s)\n    {shortened(result)}", flush=True)


def shortened(result):
    text = " ".join(repr(result).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def serve(model):
    """(process, address) of a server of the model."""
    command = [sys.executable, str(ROOT / "serve.py"), f"--model={model}", "--name=smollm2"]
    # float32: at a temperature of 0 a stream then says what the whole says, letter by letter.
    command += ["--port=0", "--max_len=1024", "--max_batch=2", "--dtype=float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        found = re.search(r"serving \S+ at (\S+)", line)
        if found:
            return process, found[1]
    raise SystemExit("the server did not start")


# --------------------------------------------------------------------------------------------------


def show_openai(show, url):
    import openai
    import pydantic

    class Weather(pydantic.BaseModel):
        city: str
        unit: Literal["celsius", "fahrenheit"]

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    ask = [{"role": "user", "content": QUESTION}]
    how = dict(model="smollm2", messages=ask, max_tokens=60, temperature=0)
    chat = client.chat.completions

    def stream():
        chunks = chat.create(**how, stream=True, stream_options={"include_usage": True})
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    def tools_loop():
        talk = list(ask)
        with_tools = how | {"tools": [TOOL], "parallel_tool_calls": False}
        first = chat.create(**with_tools | {"messages": talk, "tool_choice": "required"})
        message = first.choices[0].message
        call = message.tool_calls[0]
        arguments = json.loads(call.function.arguments)
        talk.append(message)
        talk.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees, rain"})
        last = chat.create(**with_tools | {"messages": talk})
        return call.function.name, arguments, last.choices[0].message.content

    def streamed_calls():
        more = dict(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
        with chat.stream(**how, **more) as events:
            kinds = [event.type for event in events]
            calls = events.get_final_completion().choices[0].message.tool_calls
        names = [call.function.name for call in calls]
        return sorted(set(kinds)), names

    def parse_tool():
        tools = [openai.pydantic_function_tool(Weather)]
        more = dict(tools=tools, tool_choice="required", parallel_tool_calls=False)
        message = chat.parse(**how, **more).choices[0].message
        return message.tool_calls[0].function.parsed_arguments

    def responses():
        answer = client.responses.create(model="smollm2", input=QUESTION, max_output_tokens=30)
        return answer.output_text

    async def concurrent():
        other = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked = [other.completions.create(model="smollm2", prompt=t, max_tokens=8) for t in "ab"]
        return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    show("models.list", lambda: [model.id for model in client.models.list()])
    show("chat.completions.create", lambda: chat.create(**how).choices[0].message.content)
    show("chat.completions.create(stream=True)", stream)
    show("tools: call, role tool, answer", tools_loop)
    show("chat.completions.stream(tools=…)", streamed_calls)
    parse = lambda of: of.parse(**how, response_format=Weather).choices[0].message.parsed
    show("chat.completions.parse(response_format=a pydantic model)", lambda: parse(chat))
    show("beta.chat.completions.parse", lambda: parse(client.beta.chat.completions))
    show("chat.completions.parse(tools=[pydantic_function_tool])", parse_tool)
    complete = dict(model="smollm2", prompt="import os", max_tokens=12, temperature=0)
    show("completions.create", lambda: client.completions.create(**complete).choices[0].text)
    embed = dict(model="smollm2", input=["one text", "another"])
    vectors = lambda: [len(row.embedding) for row in client.embeddings.create(**embed).data]
    show("embeddings.create: lengths", vectors)
    show("responses.create", responses)
    show("AsyncOpenAI: two at once", concurrent)


def show_langchain(show, url):
    import pydantic
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    class Weather(pydantic.BaseModel):
        """The weather in a city."""

        city: str
        unit: Literal["celsius", "fahrenheit"]

    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"18 degrees and rain in {city}"

    how = dict(model="smollm2", base_url=f"{url}/v1", api_key="none", temperature=0)
    llm = ChatOpenAI(**how, max_tokens=60, max_retries=0)

    def tools_loop():
        talk = [HumanMessage(QUESTION)]
        caller = llm.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
        message = caller.invoke(talk)
        call = message.tool_calls[0]
        talk += [message, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
        return call["name"], call["args"], llm.bind_tools([weather]).invoke(talk).content

    def streamed_calls():
        caller = llm.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
        whole = None
        for chunk in caller.stream(QUESTION):
            whole = chunk if whole is None else whole + chunk
        return whole.tool_calls[0]["name"], whole.tool_calls[0]["args"]

    def structured(method):
        # json_mode asks for any JSON object; what is in it is the prompt's to say.
        prompt = f'{QUESTION} Answer with {{"city": …, "unit": "celsius"}} in JSON.'
        return llm.with_structured_output(Weather, method=method, include_raw=True).invoke(prompt)

    show("ChatOpenAI.invoke", lambda: llm.invoke(QUESTION).content)
    show("stream", lambda: "".join(chunk.content for chunk in llm.stream(QUESTION)))
    show("bind_tools: call, ToolMessage, answer", tools_loop)
    show("bind_tools(…).stream", streamed_calls)
    for method in ("json_schema", "function_calling"):
        show(
            f"with_structured_output(method={method!r})",
            lambda method=method: structured(method)["parsed"] or 1 / 0,
        )
    show(
        "with_structured_output(method='json_mode')", lambda: structured("json_mode")["raw"].content
    )
    show("batch", lambda: [m.content[:40] for m in llm.batch([QUESTION, "Hello"])])
    how = dict(model="smollm2", base_url=f"{url}/v1", api_key="none")
    vectors = OpenAIEmbeddings(**how, check_embedding_ctx_length=False)
    show("OpenAIEmbeddings.embed_query: length", lambda: len(vectors.embed_query("one text")))


def show_llamaindex(show, url):
    import pydantic
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    class Weather(pydantic.BaseModel):
        city: str
        unit: Literal["celsius", "fahrenheit"]

    def weather(city: str) -> str:
        """The weather in a city."""
        return f"18 degrees and rain in {city}"

    how = dict(model="smollm2", api_base=f"{url}/v1", api_key="none", context_window=1024)
    how |= dict(is_chat_model=True, is_function_calling_model=True, temperature=0, max_tokens=60)
    llm = OpenAILike(**how, max_retries=0)
    ask = [ChatMessage(role="user", content=QUESTION)]

    def predict():
        tools = [FunctionTool.from_defaults(weather)]
        answer = llm.predict_and_call(tools, QUESTION, tool_required=True)
        return answer.response

    def calls():
        tools = [FunctionTool.from_defaults(weather)]
        answer = llm.chat_with_tools(tools, user_msg=QUESTION, tool_required=True)
        return [(c.tool_name, c.tool_kwargs) for c in llm.get_tool_calls_from_response(answer)]

    def structured():
        return llm.as_structured_llm(Weather).complete(QUESTION).raw

    show("OpenAILike.complete", lambda: llm.complete("Hello").text)
    show("chat", lambda: llm.chat(ask).message.content)
    show("stream_chat", lambda: "".join(r.delta for r in llm.stream_chat(ask)))
    show("chat_with_tools(tool_required=True)", calls)
    show("predict_and_call", predict)
    show("as_structured_llm(a pydantic model)", structured)


def show_litellm(show, url):
    import litellm

    litellm.telemetry = False
    how = dict(model="openai/smollm2", api_base=f"{url}/v1", api_key="none", temperature=0)
    ask = [{"role": "user", "content": QUESTION}]
    chat = how | dict(messages=ask, max_tokens=60)
    message = lambda **more: litellm.completion(**chat, **more).choices[0].message

    def stream():
        chunks = litellm.completion(**chat, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def calls():
        said = message(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
        return [(call.function.name, call.function.arguments) for call in said.tool_calls]

    def schema():
        form = {"name": "weather", "schema": SCHEMA, "strict": True}
        return message(response_format={"type": "json_schema", "json_schema": form}).content

    how.pop("temperature")
    vectors = lambda: len(litellm.embedding(input=["one text"], **how).data[0]["embedding"])
    show("completion", lambda: message().content)
    show("completion(stream=True)", stream)
    show("completion(tools=…)", calls)
    show("completion(response_format=json_schema)", schema)
    show("embedding: length", vectors)


def show_curl(show, url):
    def curl(path, body):
        data = json.dumps(body)
        result = subprocess.run(
            ["curl", "-sS", f"{url}{path}", "-d", data], capture_output=True, text=True, check=True
        )
        return json.loads(result.stdout)

    ask = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60, "temperature": 0}
    chat = lambda **more: curl("/v1/chat/completions", ask | more)["choices"][0]["message"]
    calls = dict(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    show("chat", lambda: chat()["content"])
    show("chat with tools", lambda: chat(**calls)["tool_calls"])
    complete = {"prompt": "import os", "max_tokens": 12, "temperature": 0}
    show("completions", lambda: curl("/v1/completions", complete)["choices"][0]["text"])


CLIENTS = {
    "openai": show_openai,
    "langchain": show_langchain,
    "llamaindex": show_llamaindex,
    "litellm": show_litellm,
    "curl": show_curl,
}


def main():
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(CLIENTS):
        raise SystemExit(__doc__)
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched from afar
    show = Show()
    process, url = serve(sys.argv[1])
    try:
        for name in sys.argv[2:] or CLIENTS:
            show.client = name
            print(f"\n== {name}", flush=True)
            try:
                CLIENTS[name](show, url)
            except ImportError as error:
                print(f"passed over: {error}")
    finally:
        process.terminate()
        process.wait()
    print(f"\n{show.n_calls} calls, {len(show.failed)} failed")
    for what in show.failed:
        print(f"failed: {what}")
    sys.exit(bool(show.failed))


if __name__ == "__main__":
    main()
