"""Every act of a faulty node, as a real client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pytest

from edge_common.errors import OffloadError
from edge_runtime.offload.connection import Connection, Reply
from engines.bundle import Bundle, TensorSpec
from engines.ort import OrtEngine
from faults import nodes, sodium
from faults.asking import ask, connected, feeds
from faults.nodes import Act, Ask, FaultyNode, Mix, NodeProcess, Pool, Script, policy_from
from transport.messages import Request, new_id

T = TypeVar("T")
raw = pytest.mark.skipif(sodium.MISSING is not None, reason=str(sodium.MISSING))
WIRES = ["router", pytest.param("raw", marks=raw)]


def run(node: FaultyNode, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Start the node and run `work` with a client of it, in one loop."""

    async def whole() -> T:
        async with node, connected(node.node(node.authorise()), node.bundle) as client:
            return await asyncio.wait_for(work(client), 30)

    return asyncio.run(whole())


@pytest.fixture(scope="module")
def truth(bundle: Bundle) -> Callable[[int], np.ndarray]:
    """The outputs of the stack in this process, by the seed of its `feeds`."""

    def tokens(seed: int = 0) -> np.ndarray:
        with OrtEngine(bundle.stage_path("stack"), threads=1, device="cpu") as engine:
            return engine.run(feeds(bundle, seed))["tokens"]

    return tokens


@pytest.mark.parametrize("wire", WIRES)
def test_honest_answers_are_identical_on_both_wires(
    wire: Any, faulty: Callable[..., FaultyNode], truth: Callable[[int], np.ndarray]
) -> None:
    node = faulty(wire=wire)

    async def work(client: Connection) -> None:
        until = asyncio.get_running_loop().time() + 10
        info, _ = await client.info(until)
        assert info.stages[0].sha256 == node.stage.sha256
        for seed in range(5):
            reply = await ask(client, feeds(node.bundle, seed))
            assert np.array_equal(reply.outputs["tokens"], truth(seed))

    run(node, work)
    assert node.requests == node.did["honest"] == len(node.log) == 5


SILENT = r"no (result|answer) within"
REFUSED = {
    "nan": "not finite",
    "inf": "not finite",
    "shape": r"as float32 \[2, 16, 7\]",
    "dtype": "as float16",
    "name": "returned tensors tokens_",
    "batch": r"as float32 \[3, 16, 8\]",
    "wrong_id": SILENT,
    "wrong_stage": "wrong_bundle",
    "refuse": "overloaded",
    "truncated": "its header describes",
    "wrong_seal": "not sealed with its request.s key",
    "frames": "message of 2 frames",
    "garbage": "not an edge-runtime message",
    "version": "protocol version 254",
    "no_tensors": "returned tensors none",
    "info": "answered with Info",
    "late": SILENT,
    "stall": SILENT,
    "accepted_only": SILENT,
    "never_read": SILENT,
    "endless": SILENT,
    "giant": "connection lost",
    "close_mid": "connection lost",
    "half": SILENT,
}
"""The client's error for each act that it can detect. The tests below have the other acts."""


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        *((kind, "router") for kind in REFUSED if kind not in nodes.RAW_ONLY),
        *(pytest.param(kind, "raw", marks=raw) for kind in REFUSED),
    ],
)
def test_detectable_lies_are_detected(
    kind: Any, wire: Any, faulty: Callable[..., FaultyNode]
) -> None:
    act = Act(kind, size=1 << 20, seconds=2)
    node = faulty(Script(act), wire=wire)
    patient = REFUSED[kind] != SILENT

    async def work(client: Connection) -> None:
        with pytest.raises(OffloadError, match=REFUSED[kind]):
            await ask(client, feeds(node.bundle), seconds=20 if patient else 0.3)
        while not node.did:
            await asyncio.sleep(0.01)

    run(node, work)
    assert node.did == {kind: 1}
    assert [told for _, told in node.log] == [kind]


@pytest.mark.parametrize("kind", ["zeros", "norm", "forge", "cross_frame", "cross_node"])
def test_plausible_lies_arrive_as_results(
    kind: Any, faulty: Callable[..., FaultyNode], truth: Callable[[int], np.ndarray]
) -> None:
    pool = Pool()
    pool.put("other", {"tokens": np.full((2, 16, 8), 7, np.float32)})
    node = faulty(Script("honest", Act(kind, factor=10)), pool=pool)

    async def work(client: Connection) -> list[Reply]:
        return [await ask(client, feeds(node.bundle, seed)) for seed in (0, 1, 2)]

    got = [reply.outputs["tokens"] for reply in run(node, work)]
    assert np.array_equal(got[0], truth(0))
    assert np.array_equal(got[2], truth(2))
    honest, lie = truth(1), got[1]
    assert not np.array_equal(lie, honest)
    if kind == "zeros":
        assert not lie.any()
    elif kind == "norm":
        np.testing.assert_array_equal(lie, honest * 10)
    elif kind == "forge":
        assert node.forged == 2
        np.testing.assert_array_equal(np.sort(lie.ravel()), np.sort(honest.ravel()))
    elif kind == "cross_frame":
        np.testing.assert_array_equal(lie, truth(0))
    else:
        assert (lie == 7).all()
    assert node.did == {"honest": 2, kind: 1}


@pytest.mark.parametrize(
    ("kind", "strays"),
    [("duplicate", 1), ("replay", 1), ("reordered", 1), ("wrong_id", 1), ("not_accepted", 0)],
)
def test_unexpected_messages_are_counted_as_sent(
    kind: Any, strays: int, faulty: Callable[..., FaultyNode], truth: Callable[[int], np.ndarray]
) -> None:
    node = faulty(Script("honest", kind))

    async def work(client: Connection) -> None:
        await ask(client, feeds(node.bundle))
        if kind in ("replay", "wrong_id"):
            with pytest.raises(OffloadError, match=SILENT):
                await ask(client, feeds(node.bundle, 1), seconds=0.4)
        else:
            reply = await ask(client, feeds(node.bundle, 1))
            assert np.array_equal(reply.outputs["tokens"], truth(1))
        await ask(client, feeds(node.bundle, 2))
        while client.strays < strays:
            await asyncio.sleep(0.01)
        assert client.strays == strays

    run(node, work)


def test_slow_and_late_answers_arrive_as_ordered(faulty: Callable[..., FaultyNode]) -> None:
    node = faulty(Script("honest", Act("slow", factor=20), "late"), service_s=0.01)

    async def work(client: Connection) -> None:
        await ask(client, feeds(node.bundle))
        reply = await ask(client, feeds(node.bundle))
        assert reply.compute_ms >= 200
        with pytest.raises(OffloadError, match=SILENT):
            await ask(client, feeds(node.bundle), seconds=0.3)
        while not client.strays:
            await asyncio.sleep(0.01)

    run(node, work)


def test_the_claimed_stage_appears_in_info(faulty: Callable[..., FaultyNode]) -> None:
    node = faulty(info_stage="f" * 64)

    async def work(client: Connection) -> str:
        info, _ = await client.info(asyncio.get_running_loop().time() + 10)
        return info.stages[0].sha256

    assert run(node, work) == "f" * 64


def test_acts_on_bytes_need_the_raw_wire(
    faulty: Callable[..., FaultyNode], capfd: pytest.CaptureFixture[str]
) -> None:
    node = faulty("close_mid")

    async def work(client: Connection) -> None:
        with pytest.raises(OffloadError, match="no answer"):
            await ask(client, feeds(node.bundle), seconds=0.3)

    run(node, work)
    assert "needs wire='raw'" in capfd.readouterr().err
    assert node.did["defect"] == 1


def test_the_seed_decides_which_share_of_windows_is_forged(bundle: Bundle) -> None:
    honest = {"tokens": np.random.default_rng(0).normal(size=(5000, 16, 8)).astype(np.float32)}
    specs = bundle.stage("stack").outputs
    lies = [
        nodes.falsify(honest, specs, Act("forge", share=0.04), np.random.default_rng(3))
        for _ in range(2)
    ]
    changed = (lies[0][0]["tokens"] != honest["tokens"]).any((1, 2)).sum()
    assert changed == lies[0][1]
    assert 150 < changed < 250
    assert np.array_equal(lies[0][0]["tokens"], lies[1][0]["tokens"])


@pytest.mark.parametrize("kind", get_args(nodes.Value))
def test_values_of_bfloat16_are_falsified_too(kind: Any) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    spec = TensorSpec("tokens", "bfloat16", ("n", 4, 8))
    lie, _ = nodes.falsify({"tokens": bits}, [spec], Act(kind), np.random.default_rng(0))
    ((name, array),) = lie.items()
    assert (name, array.dtype, array.shape) != ("tokens", bits.dtype, bits.shape) or (
        not np.array_equal(array, bits)
    )
    if kind in ("nan", "inf"):
        exponents = array & 0x7F80
        assert (exponents == 0x7F80).sum() == 1


def asked(number: int) -> Ask:
    return Ask(number, Request(new_id(), "0" * 64, 1000, bytes(32)), (0,))


def test_policies_are_reproducible_and_come_from_json() -> None:
    weights = {"nan": 0.2, Act("slow", factor=3): 0.1}
    once, again = (
        [Mix(weights, seed=4)(asked(n)).kind for n in numbers]  # type: ignore[arg-type]
        for numbers in (range(1000), range(1000))
    )
    assert once == again
    assert 650 < once.count("honest") < 750
    assert 150 < once.count("nan") < 250
    script = policy_from(json.loads('["nan", {"kind": "forge", "share": 0.5}, "honest"]'))
    assert [script(asked(n)).kind for n in range(4)] == ["nan", "forge", "honest", "honest"]
    mixed = policy_from({"mix": [["inf", 1.0]], "seed": 2})
    assert mixed(asked(0)).kind == "inf"
    with pytest.raises(ValueError, match="is no act"):
        policy_from("nonsense")
    with pytest.raises(ValueError, match="more than 1"):
        Mix({"nan": 0.7, "inf": 0.7})


@pytest.mark.process
@pytest.mark.parametrize("policy", [None, "norm"])
def test_a_node_process_keeps_its_port_and_keys_when_restarted(
    policy: Any, bundle: Bundle, tmp_path: Path, truth: Callable[[int], np.ndarray]
) -> None:
    with NodeProcess(Path(bundle.path), tmp_path / "node", policy=policy) as process:
        to = process.node(process.authorise())

        async def work() -> None:
            factor = 1 if policy is None else 10
            async with connected(to, bundle) as client:
                for life in range(2):
                    reply = await ask(client, feeds(bundle, life))
                    assert np.array_equal(reply.outputs["tokens"], truth(life) * factor)
                    if not life:
                        endpoint = process.endpoint
                        await asyncio.to_thread(process.restart)
                        assert process.endpoint == endpoint
                        while client.link and client.link.state != "up":
                            await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(work(), 60))
        assert process.starts == 2
