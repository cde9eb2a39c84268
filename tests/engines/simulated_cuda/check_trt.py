from __future__ import annotations

import enum
import gc
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import simulated_driver as driver
import simulated_tensorrt as simulated
from onnx import TensorProto as T
from onnx import helper as h
from toy import Toy

from edge_common.errors import EngineError, PlanError
from engines import cuda
from engines.bundle import Bundle, TensorSpec
from engines.trt import TrtEngine

pytestmark = pytest.mark.process  # some do; all run in one of their own

STACK = {"n": 6}
DECODER = {"p": 4, "k": 5}
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}
Opener = Callable[..., TrtEngine]


@pytest.fixture(params=["discrete", "integrated"])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both kinds of GPU. The process's context is set to the kind."""
    context = cuda.context()
    before = context.facts
    driver.cuda.simulated_set_integrated(int(request.param == "integrated"))
    context.facts = cuda.facts()
    yield request.param
    driver.cuda.simulated_set_integrated(0)
    context.facts = before


@pytest.fixture
def open_stack(bundle: Path) -> Opener:
    def open_(flavour: Any = "tensorrt", **options: Any) -> TrtEngine:
        plan = simulated.write_plan(Bundle.load(bundle), "stack", STACK, flavour=flavour)
        return TrtEngine(plan, simulated.library(flavour), **options)

    return open_


def stack_feeds(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 256, (n, 16, 16, 3), np.uint8),
        "extent": rng.integers(0, 17, (n, 2)),
        "window": rng.integers(0, Toy.geometry.windows, n),
    }


def check_stack(engine: TrtEngine, toy: Toy, n: int, seed: int = 0) -> None:
    feeds = stack_feeds(n, seed)
    np.testing.assert_allclose(engine.run(feeds)["tokens"], toy.stack(**feeds), **CLOSE)


def decoder_feeds(p: int, k: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    g = Toy.geometry
    shapes = {
        "embedding": (1, g.out_chans, g.grid, g.grid),
        "point_coords": (p, k, 2),
        "point_labels": (p, k),
        "mask_input": (p, 1, g.low_res, g.low_res),
        "has_mask_input": (p,),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


# Results.


def test_the_engine_reports_its_inputs_and_outputs(open_stack: Opener, bundle: Path) -> None:
    said = Bundle.load(bundle).stage("stack")
    with open_stack() as engine:
        assert (engine.inputs, engine.outputs) == (said.inputs, said.outputs)
        assert engine.notes == []


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_shapes_change_in_any_order_eagerly_and_as_graphs(
    gpu: str, open_stack: Opener, toy: Toy, flavour: str
) -> None:
    launches = driver.count("launches")
    with open_stack(flavour) as engine:
        for seed, n in enumerate([3, 3, 3, 5, 3, 1, 5, 5, 3, 6, 5, 1, 1, 3]):
            check_stack(engine, toy, n, seed)
        # The first two runs of a shape are eager. 3 windows run six times, 5 four times, 1 three.
        assert driver.count("launches") - launches == 4 + 2 + 1
        assert engine.notes == []


def test_no_copies_where_cpu_and_gpu_share_memory(gpu: str, open_stack: Opener, toy: Toy) -> None:
    copies = driver.count("copies")
    with open_stack() as engine:
        check_stack(engine, toy, 4)
    assert driver.count("copies") - copies == (4 if gpu == "discrete" else 0)


def test_the_caller_owns_the_returned_arrays(gpu: str, open_stack: Opener, toy: Toy) -> None:
    with open_stack() as engine:
        feeds = stack_feeds(2)
        first = engine.run(feeds)["tokens"]
        engine.run(stack_feeds(2, seed=1))
    np.testing.assert_allclose(first, toy.stack(**feeds), **CLOSE)
    first[:] = 0  # the caller may write to them


def test_feeds_need_not_be_contiguous(open_stack: Opener, toy: Toy) -> None:
    with open_stack() as engine:
        feeds = stack_feeds(6)
        feeds["pixels"] = feeds["pixels"][::-1, :, ::-1]
        feeds["window"] = np.repeat(feeds["window"], 2)[::2]
        np.testing.assert_allclose(engine.run(feeds)["tokens"], toy.stack(**feeds), **CLOSE)


@pytest.mark.parametrize("n", [7, 12, 13, 25])
def test_a_batch_beyond_the_plan_runs_in_parts(open_stack: Opener, toy: Toy, n: int) -> None:
    with open_stack() as engine:
        check_stack(engine, toy, n)


@pytest.mark.parametrize("n", [2, 13])
def test_outputs_are_written_to_the_given_arrays(open_stack: Opener, toy: Toy, n: int) -> None:
    feeds, room = stack_feeds(n), np.full((n + 2, 16, 8), np.nan, np.float32)
    with open_stack() as engine:
        assert engine.run(feeds, {"tokens": room[1:-1]})["tokens"].base is room
        with pytest.raises(EngineError, match="out has float32"):
            engine.run(feeds, {"tokens": room})
    np.testing.assert_allclose(room[1:-1], toy.stack(**feeds), **CLOSE)
    assert np.isnan(room[[0, -1]]).all()


def test_booleans_and_static_shapes_work(gpu: str, bundle: Path, toy: Toy) -> None:
    plan = simulated.write_plan(Bundle.load(bundle), "tail", {})
    g = toy.geometry
    rng = np.random.default_rng(0)
    with TrtEngine(plan, simulated.library()) as engine:
        for _ in range(4):
            tokens = rng.standard_normal((g.windows, g.tokens_per_window, g.embed_dim), np.float32)
            present = rng.random(g.windows) < 0.5
            found = engine.run({"tokens": tokens, "present": present})["embedding"]
            np.testing.assert_allclose(found, toy.tail(tokens, present), **CLOSE)


def test_empty_dimensions_and_two_dynamic_ones_work(gpu: str, bundle: Path, toy: Toy) -> None:
    plan = simulated.write_plan(Bundle.load(bundle), "decoder", DECODER, {"k": 0})
    with TrtEngine(plan, simulated.library()) as engine:
        # 9 prompts exceed the plan's 4. The embedding has one row and goes with every part.
        for p, k in [(1, 0), (1, 1), (4, 5), (1, 0), (1, 0), (2, 3), (9, 0), (9, 2), (9, 2)]:
            feeds = decoder_feeds(p, k, seed=p + k)
            logits, iou = toy.decode(*feeds.values())
            found = engine.run(feeds)
            np.testing.assert_allclose(found["low_res_logits"], logits, **CLOSE)
            np.testing.assert_allclose(found["iou"], iou, **CLOSE)
        for p, k, said in [(1, 6, "k is 6, but .* 0 to 5"), (0, 1, "p is 0, but .* 1 to 4")]:
            with pytest.raises(EngineError, match=said) as caught:
                engine.run(decoder_feeds(p, k))
            # that command has no option for these
            assert "edge-runtime build" not in str(caught.value)


def test_bfloat16_keeps_its_bits(bundle: Path, tmp_path: Path) -> None:
    tensors = [h.make_tensor_value_info(name, T.BFLOAT16, ["n", 3]) for name in ("x", "y")]
    graph = h.make_graph([h.make_node("Identity", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    opset = [h.make_opsetid("", 21)]
    onnx.save(h.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "bf16.onnx")
    plan = simulated.write_plan(
        Bundle.load(bundle),
        "stack",
        STACK,
        graph=tmp_path / "bf16.onnx",
        inputs=(TensorSpec("x", "bfloat16", ("n", 3)),),
        outputs=(TensorSpec("y", "bfloat16", ("n", 3)),),
    )
    bits = np.arange(6, dtype=np.uint16).reshape(2, 3) + 0x3F80
    with TrtEngine(plan, simulated.library()) as engine:
        np.testing.assert_array_equal(engine.run({"x": bits})["y"], bits)
        with pytest.raises(EngineError, match="x is float16, expected uint16"):
            engine.run({"x": bits.view(np.float16)})


# The simulation itself


def test_the_real_library_has_every_name_of_the_simulated_one() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    own = {"said", "logger", "ort", "shapes", "compute", "ready", "error", "allocation"}
    for ours, theirs in [
        (simulated.Runtime, real.Runtime),
        (simulated.Engine, real.ICudaEngine),
        (simulated.CapturableContext, real.IExecutionContext),
        (simulated.RuntimeConfig, real.IRuntimeConfig),
        (simulated.ILogger, real.ILogger),
    ]:
        names = {name for name in dir(ours) if not name.startswith("_")}
        assert names - own <= set(dir(theirs)), ours
    for name, kind in vars(simulated).items():
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and name not in ("Enum",):
            members = {member.name for member in kind}
            assert members <= set(getattr(real, name).__members__), name


# Graphs.


def test_without_cuda_python_the_engine_runs_and_logs_it(
    open_stack: Opener, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "graph_driver", lambda: None)
    captures = driver.count("captures")
    with open_stack() as engine:
        for seed in range(4):
            check_stack(engine, toy, 2, seed)
        assert engine.notes == [
            "no CUDA graphs: cuda-python is not installed: `pip install cuda-python`"
        ]
    assert driver.count("captures") == captures
    with pytest.raises(EngineError, match="CUDA graphs were asked for, but cuda-python"):
        open_stack(graphs=True)


def test_graphs_can_be_disabled(open_stack: Opener, toy: Toy) -> None:
    captures = driver.count("captures")
    with open_stack(graphs=False) as engine:
        for seed in range(4):
            check_stack(engine, toy, 2, seed)
        assert engine.notes == []
    assert driver.count("captures") == captures


def test_a_cuda_python_that_does_not_fit_the_driver_is_no_failure(
    open_stack: Opener, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuda-python looks up the driver's functions on call and raises RuntimeError."""

    def missing(*arguments: object) -> None:
        raise RuntimeError('Function "cuStreamBeginCapture_v2" not found')

    real = cuda.graph_driver()
    assert real is not None
    monkeypatch.setattr(real, "cuStreamBeginCapture", missing)
    with open_stack() as engine:
        for seed in range(4):
            check_stack(engine, toy, 2, seed)
        assert engine.notes == ['no CUDA graphs: Function "cuStreamBeginCapture_v2" not found']


def test_a_library_that_cannot_capture_still_runs(
    open_stack: Opener, toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    simulated.failures.capturable = False
    with open_stack("tensorrt-rtx") as engine, caplog.at_level(logging.WARNING):
        for seed in range(4):
            check_stack(engine, toy, 2, seed)
        assert engine.notes == ["no CUDA graphs: TensorRT-RTX 1.7.1 cannot capture this plan"]
    assert caplog.text.count("runs without CUDA graphs") == 1


def test_the_number_of_kept_graphs_is_limited(bundle: Path, toy: Toy) -> None:
    plan = simulated.write_plan(Bundle.load(bundle), "stack", {"n": 12})
    with TrtEngine(plan, simulated.library()) as engine:
        for seed, n in enumerate(itertools.chain(range(1, 13), range(1, 13), range(12, 0, -1))):
            check_stack(engine, toy, n, seed)
            assert driver.count("graph_execs") <= 8
        assert driver.count("graph_execs") == 8


def test_the_graph_unused_for_longest_goes_first(bundle: Path, toy: Toy) -> None:
    plan = simulated.write_plan(Bundle.load(bundle), "stack", {"n": 12})
    with TrtEngine(plan, simulated.library()) as engine:
        for n in [*range(1, 9), *range(1, 9), 1, 9, 9]:  # the second run of each makes its graph
            check_stack(engine, toy, n)
        launches = driver.count("launches")
        check_stack(engine, toy, 1)
        assert driver.count("launches") == launches + 1


# Several engines.


def test_engines_of_one_plan_share_its_weights_and_close_in_any_order(
    open_stack: Opener, toy: Toy
) -> None:
    for order in itertools.permutations(range(3)):
        first = open_stack()
        alone = driver.count("allocations")
        engines = [first, first.another(), first.another()]
        assert driver.count("allocations") == alone + 2 * (alone - 1)  # all but the weights
        for n, index in enumerate(order):
            for engine in (engines[i] for i in order[n:]):
                for seed in range(3):
                    check_stack(engine, toy, 2, seed)
            engines[index].close()
            engines[index].close()
            with pytest.raises(EngineError, match=r"stack\.plan was closed"):
                engines[index].run(stack_feeds(1))
            with pytest.raises(EngineError, match=r"stack\.plan was closed"):
                engines[index].another()
            for engine in (engines[i] for i in order[n + 1 :]):
                with engine.another() as late:
                    check_stack(late, toy, 3)
        assert driver.live() == {}


def test_threads_may_share_an_engine_or_have_their_own(open_stack: Opener, toy: Toy) -> None:
    failures: list[BaseException] = []

    def work(engine: TrtEngine, seed: int) -> None:
        try:
            for turn in range(12):
                check_stack(engine, toy, 1 + (seed + turn) % 8, seed * 100 + turn)
        except BaseException as error:
            failures.append(error)

    with open_stack() as engine, engine.another() as other:
        threads = [
            threading.Thread(target=work, args=(e, seed))
            for seed, e in enumerate([engine, engine, other, other])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    assert failures == []


def test_an_engine_opened_in_one_thread_is_closed_in_another(open_stack: Opener) -> None:
    engine = open_stack()
    thread = threading.Thread(target=engine.close)
    thread.start()
    thread.join()
    assert driver.live() == {}


def test_a_leaked_engine_is_released(open_stack: Opener, toy: Toy) -> None:
    engine = open_stack()
    for seed in range(3):
        check_stack(engine, toy, 2, seed)
    ring: list[Any] = [engine]
    ring.append(ring)
    del engine, ring
    gc.collect()
    assert driver.live() == {}


def test_a_process_may_end_while_threads_run_engines(bundle: Path) -> None:
    """A killed server does this: nothing closes the engine, and its threads are daemons."""
    plan = simulated.write_plan(Bundle.load(bundle), "stack", STACK)
    code = f"""
import atexit, sys, threading, time
import simulated_driver as driver
atexit.register(lambda: print(driver.live(), driver.count("errors"), driver.count("retains")))
import numpy as np
import simulated_tensorrt as simulated
from engines.bundle import Bundle
from edge_common.errors import EngineError
from engines.plan import plans
from engines.trt import TrtEngine
compute = simulated.ExecutionContext.compute
def slow(context):
    time.sleep(0.2)  # so that the end comes in the middle of a run
    compute(context)
simulated.ExecutionContext.compute = slow
engine = TrtEngine(plans(Bundle.load({str(bundle)!r}))[0], simulated.library())
feeds = {{"pixels": np.zeros((2, 16, 16, 3), np.uint8)}}
feeds |= {{"extent": np.zeros((2, 2), np.int64), "window": np.zeros(2, np.int64)}}
ran = threading.Event()
def serve(engine):
    try:
        while True:
            engine.run(feeds)
            ran.set()
    except EngineError as error:
        assert "was closed" in str(error), error
for one in (engine, engine, engine.another()):
    threading.Thread(target=serve, args=(one,), daemon=True).start()
ran.wait()
"""
    assert plan.path.is_file()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{} 0 0\n", "")


# Times


def test_device_times_count_the_plan_alone(open_stack: Opener) -> None:
    """In the simulated clock a plan takes one millisecond and a copy a thousandth."""
    with open_stack() as engine:
        assert engine.device_times(stack_feeds(3), 0, 3) == pytest.approx([1.001] * 3, abs=5e-3)
        launches = driver.count("launches")
        times = engine.device_times(stack_feeds(3), 2, 4)
        assert times == pytest.approx([1.001] * 4, abs=5e-3)
        assert driver.count("launches") - launches == 4
        with pytest.raises(EngineError, match=r"n is 7, but .* 1 to 6"):
            engine.device_times(stack_feeds(7), 0, 1)


# Refusals


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_plan_that_the_library_refuses(open_stack: Opener, flavour: str) -> None:
    simulated.failures.name = "deserialize_cuda_engine"
    with pytest.raises(PlanError) as caught:
        open_stack(flavour)
    text = str(caught.value)
    assert "stack.plan: [runtime.cpp::parse::314] Error Code 6: plan [31m of another: edge" in text
    assert f"edge-runtime build {{}} --stage stack --backend {flavour}".split("{}")[1] in text
    assert driver.live() == {}


def test_a_plan_with_a_refused_header(open_stack: Opener) -> None:
    simulated.failures.invalid = int(simulated.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    with pytest.raises(PlanError, match=r"TensorRT-RTX 1\.7\.1 refuses .*: unsupported cc: edge"):
        open_stack("tensorrt-rtx")
    simulated.failures.invalid = int(simulated.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER)
    with pytest.raises(PlanError, match=r"driver: .*doctor.*building it again would not help"):
        open_stack("tensorrt-rtx")


def test_a_plan_that_contradicts_its_record(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    said = loaded.stage("stack")
    plan = simulated.write_plan(loaded, "stack", STACK)
    for inputs, outputs, reason in [
        (said.inputs[:2], said.outputs, r"tensors extent, pixels, tokens, window, but its record"),
        (
            (said.inputs[0], TensorSpec("extent", "int32", ("n", 2)), said.inputs[2]),
            said.outputs,
            r"extent as INPUT DEVICE int64 \(-1, 2\), but its record says INPUT DEVICE int32",
        ),
        (said.inputs, (TensorSpec("tokens", "float32", ("m", 16, 8)),), "size m of its own"),
        (said.inputs, (TensorSpec("tokens", "float32", (6, 16, 8)),), r"\(-1, 16, 8\), but its"),
    ]:
        record = msgspec.structs.replace(plan.record, inputs=inputs, outputs=outputs)
        with pytest.raises(PlanError, match=reason):
            TrtEngine(type(plan)(plan.path, record), simulated.library())
        assert driver.live() == {}


def test_changed_bytes_never_reach_the_library(open_stack: Opener) -> None:
    engine = open_stack()
    plan = engine._loaded.plan
    engine.close()
    data = bytearray(plan.path.read_bytes())
    data[-1] ^= 1
    plan.path.write_bytes(data)
    calls = simulated.failures.calls
    with pytest.raises(PlanError, match="is damaged: its sha256"):
        TrtEngine(plan, simulated.library())
    assert simulated.failures.calls == calls


def test_the_library_s_messages_reach_error_and_log(
    open_stack: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    with open_stack() as engine, caplog.at_level(logging.ERROR):
        simulated.failures.name = "execute_async_v3"
        with pytest.raises(EngineError) as caught:
            engine.run(stack_feeds(2))
        assert caught.value.found == (
            "TensorRT 10.3.0 did not run the plan (stack.plan): "
            "[enqueue] Error Code 1: a simulated reason"
        )
        simulated.failures.name = "set_input_shape"
        with pytest.raises(
            EngineError, match=r"refuses pixels of shape \(3, .*: a simulated reason"
        ):
            engine.run(stack_feeds(3))
        simulated.failures.reset()
        engine.run(stack_feeds(3))
    assert "TensorRT 10.3.0: [enqueue] Error Code 1: a simulated reason." in caplog.text


def test_refused_shapes_do_not_persist(open_stack: Opener, toy: Toy) -> None:
    with open_stack(graphs=False) as engine:
        check_stack(engine, toy, 2)
        simulated.failures.name = "infer_shapes"
        with pytest.raises(EngineError, match="finds no output shapes: a simulated reason"):
            engine.run(stack_feeds(3))
        simulated.failures.reset()
        check_stack(engine, toy, 2, seed=1)


def test_wrong_feeds_are_refused(open_stack: Opener) -> None:
    with open_stack() as engine:
        with pytest.raises(EngineError, match="missing window"):
            engine.run({"pixels": stack_feeds(1)["pixels"], "extent": np.zeros((1, 2), np.int64)})
        with pytest.raises(EngineError, match="window is int32, expected int64"):
            engine.run({**stack_feeds(2), "window": np.zeros(2, np.int32)})


# Memory, and failures at every call


def test_a_failure_of_each_allocation_in_turn(gpu: str, open_stack: Opener, toy: Toy) -> None:
    with open_stack() as engine:
        needed = driver.count("used")
    seen = set()
    for size in range(0, needed, 256):
        with driver.memory(size), pytest.raises(EngineError) as caught:
            open_stack()
        text = str(caught.value)
        assert driver.live() == {}, text
        seen.add(text.split(" needs")[0].removeprefix("out of memory on Simulated GPU: "))
        assert "MiB" in text or "no execution context" in text or "refuses" in text, text
    assert {
        "input pixels of the stack",
        "output tokens of the stack",
        "the stack's working memory",
    } <= seen
    # The engine opens now, but a change of shapes needs more memory than there is.
    with (
        driver.memory(needed),
        open_stack() as engine,
        pytest.raises(EngineError, match="did not run the plan"),
    ):
        check_stack(engine, toy, 2)


def test_no_memory_for_graphs_is_no_failure(open_stack: Opener, toy: Toy) -> None:
    with open_stack() as engine:
        with driver.memory(driver.count("used") + 256):
            for seed in range(3):
                check_stack(engine, toy, 2, seed)
        assert len(engine.notes) == 1
        assert "made no execution context" in engine.notes[0]


def use(open_stack: Opener, toy: Toy, opened: ExitStack) -> None:
    """Use every operation of an engine: open, run, capture, launch, open another, time, close."""
    engine = opened.enter_context(open_stack())
    for seed, n in enumerate([2, 2, 2, 3, 2, 7]):
        check_stack(engine, toy, n, seed)
    other = opened.enter_context(engine.another())
    check_stack(other, toy, 2)
    other.device_times(stack_feeds(2), 1, 1)
    engine.close()
    check_stack(other, toy, 2)


@pytest.mark.parametrize("code", [driver.OUT_OF_MEMORY, 700])
def test_a_failed_driver_call_leaks_nothing(
    gpu: str, open_stack: Opener, toy: Toy, code: int
) -> None:
    """Fail the first driver call, then the second, and so on to the last."""
    functions = set()
    for index in itertools.count(1):
        with driver.failing(index, code), ExitStack() as opened:
            try:
                use(open_stack, toy, opened)
                failed = False
            except EngineError as error:
                failed = True
                text = str(error)
                error.__traceback__ = None
            name = driver.failed_call()
        functions.add(name)
        assert driver.live() == {}, f"{name}, call {index}"
        assert driver.count("errors") == 0, f"{name}, call {index}"
        if not name:
            break
        # These must not fail: a graph that could not be captured, and releasing.
        if not failed:
            assert name.startswith(("cuGraph", "cuStream", "cuMem", "cuLaunch")), name
        else:
            assert len(text) > 40
    assert not failed
    expected = {"cuMemHostAlloc", "cuStreamCreate", "cuLaunchHostFunc", "cuStreamSynchronize"}
    expected |= {"cuStreamBeginCapture_v2", "cuGraphLaunch", "cuEventCreate", "cuEventRecord"}
    assert expected <= functions, functions


def test_a_failed_library_call_leaks_nothing(gpu: str, open_stack: Opener, toy: Toy) -> None:
    functions = set()
    for index in itertools.count(1):
        simulated.failures.reset()
        simulated.failures.at = index
        with ExitStack() as opened:
            try:
                use(open_stack, toy, opened)
                failed = False
            except EngineError as error:
                failed = True
                text = str(error)
        name = simulated.failures.failed
        functions.add(name)
        assert driver.live() == {}, f"{name}, call {index}"
        if name is None:
            break
        if failed:
            assert "reason" in text or "another" in text or "nullptr" in text or "(-1,)" in text
    assert not failed
    assert functions == {
        None,
        "Runtime",
        "deserialize_cuda_engine",
        "create_execution_context",
        "set_tensor_address",
        "set_input_shape",
        "infer_shapes",
        "get_tensor_shape",
        "execute_async_v3",
    }


def test_after_a_failed_run_the_next_one_is_correct(gpu: str, open_stack: Opener, toy: Toy) -> None:
    failed = 0
    with open_stack() as engine:
        simulated.failures.name = "execute_async_v3"
        with pytest.raises(EngineError):
            engine.run(stack_feeds(2))
        simulated.failures.reset()
        for turn, after in itertools.product(range(4), range(1, 7)):
            with driver.failing(after, 700):
                try:
                    engine.run(stack_feeds(2, 50 + turn))
                except EngineError:
                    failed += 1
            check_stack(engine, toy, 2, turn)
    assert failed >= 8


def test_a_kept_error_keeps_nothing_else_alive(gpu: str, open_stack: Opener) -> None:
    """A log or a debugger keeps errors. The traceback holds the frames."""
    kept: list[EngineError] = []
    for index in itertools.count(1):
        engine = open_stack()
        with driver.failing(index, 700):
            try:
                engine.device_times(stack_feeds(2), 3, 2)
            except EngineError as error:
                kept.append(error)
            failed = driver.failed_call()
        engine.close()
        assert driver.live() == {}, failed
        if not failed:
            break
    simulated.failures.name = "execute_async_v3"
    with open_stack() as engine, pytest.raises(EngineError) as caught:
        engine.run(stack_feeds(2))
    assert driver.live() == {}
    assert len(kept) > 10
    assert caught.value.__traceback__ is not None


def test_an_interrupt_leaves_the_engine_usable(
    open_stack: Opener, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_stack() as engine:
        with monkeypatch.context() as patch:

            def interrupt(*_: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(engine._worker, "_enqueue", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.run(stack_feeds(2))
            assert driver.count("queued") == 0
        check_stack(engine, toy, 2)
