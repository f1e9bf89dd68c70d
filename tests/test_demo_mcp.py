"""The demo as a server of tools for AI assistants, and on ZeroGPU."""

import asyncio
import base64
import multiprocessing
import sys
import types
from importlib.util import find_spec

import pytest
from conftest import SEVEN

from hf_clpeft.backbones.bundled import DIGITS_MODEL
from hf_clpeft.cli.demo import demo as demo_command
from hf_clpeft.config.errors import ConfigError
from hf_clpeft.demo import build_demo, launch_options
from hf_clpeft.demo.gpu import on_gpu


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("mcp")
    demo = build_demo(DIGITS_MODEL)
    demo.launch(prevent_thread_lock=True, quiet=True, mcp_server=True, **launch_options())
    yield demo.local_url
    demo.close()


def test_a_page_without_tools_may_follow_in_the_same_program(server):
    plain = build_demo(DIGITS_MODEL)
    plain.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    plain.close()


def talk(server, *calls):
    """Lists the tools, and calls some of them."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def speak():
        async with (
            streamablehttp_client(f"{server}gradio_api/mcp/http/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            results = []
            for name, arguments in calls:  # gradio may put the name of the app before it
                full = next(known for known in tools if known.endswith(name))
                results.append(await session.call_tool(full, arguments))
            return tools, results

    return asyncio.run(speak())


def test_every_tool_says_what_it_does_and_takes_pictures(server):
    data = base64.b64encode(SEVEN.read_bytes()).decode()
    tools, (answer, heat) = talk(
        server,
        ("predict", {"picture": f"data:image/png;base64,{data}"}),
        ("explain", {"picture": f"data:image/png;base64,{data}"}),
    )
    names = ("predict", "explain", "compare_experts", "predict_files", "look_inside")
    assert all(any(tool.endswith(name) for tool in tools) for name in names)
    for tool in tools.values():
        assert len(tool.description) > 20 and "Returns" in tool.description
    assert not answer.isError and "'label': '7'" in "".join(
        part.text for part in answer.content if part.type == "text"
    )
    assert not heat.isError


def test_a_picture_that_was_uploaded_is_named_by_its_address_and_no_other_is_fetched(server):
    import httpx

    (path,) = httpx.post(f"{server}gradio_api/upload", files={"files": SEVEN.read_bytes()}).json()
    _, (own, foreign, outside) = talk(
        server,
        ("predict", {"picture": f"{server}gradio_api/file={path}"}),
        ("predict", {"picture": "http://127.0.0.1:9/secret.png"}),
        ("predict", {"picture": f"{server}gradio_api/file=/etc/passwd"}),
    )
    text = "".join(part.text for part in own.content if part.type == "text")
    assert not own.isError and "'label': '7'" in text
    for refused in (foreign, outside):
        said = "".join(part.text for part in refused.content if part.type == "text")
        assert refused.isError or "Links are not fetched" in said or "Upload the file first" in said
        assert "'label'" not in said and "root:" not in said


def test_the_command_offers_tools(monkeypatch, saved):
    asked = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda demo, **options: asked.update(options))
    if find_spec("mcp"):
        demo_command(str(saved), port=7000, browser=False, teaching=False, mcp=True)
        assert asked["mcp_server"]
    monkeypatch.setattr(sys.modules["hf_clpeft.cli.demo"], "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gradio\[mcp\]'"):
        demo_command(str(saved), browser=False, mcp=True)


def lending(function, asked):
    """What `spaces.GPU` does: the function runs in a copy of the process."""

    def wrapper(*arguments):
        asked.append(function.__name__)
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        process = context.Process(target=lambda: results.put(function(*arguments)))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        return results.get()

    return wrapper


def test_a_lent_gpu_answers_in_a_process_of_its_own(handlers, monkeypatch):
    asked = []
    fake = types.SimpleNamespace(GPU=lambda duration: lambda function: lending(function, asked))
    monkeypatch.setitem(sys.modules, "spaces", fake)
    lent = on_gpu(handlers.predict)
    assert lent(str(SEVEN))[3]["label"] == "7" and asked == ["predict"]


def test_without_the_package_nothing_is_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", types.ModuleType("spaces"))  # a folder of that name
    assert on_gpu(len) is len
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert on_gpu(len) is len
