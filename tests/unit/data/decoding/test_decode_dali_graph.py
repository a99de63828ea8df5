"""The pipeline for the GPU, checked without one: against the schemas and the lists of operators of the installed DALI.

Nothing is decoded. What is checked is what DALI itself says of its operators: their arguments, where they run and where their inputs lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from nvidia.dali import Pipeline, backend, fn

from megasora.data.decoding import dali
from megasora.data.decoding.dali import graph

REGISTERED = {
    "cpu": backend.RegisteredCPUOps,
    "gpu": backend.RegisteredGPUOps,
    "mixed": backend.RegisteredMixedOps,
}
"""Device of an operator -> operators the library has there."""
ADDED_BY_DALI = {"device", "preserve_name"}
"""Arguments of every operator, which schemas do not list."""


def pipeline() -> Pipeline:
    """A pipeline whose backend is never built: that needs CUDA."""
    return Pipeline(batch_size=2, num_threads=1, device_id=0, prefetch_queue_depth=1, exec_dynamic=False)


def operators(node: Any) -> Iterator[Any]:
    """The operators that a node comes from, last first; each once."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        source = waiting.pop().source
        if source is None or id(source) in seen:
            continue
        seen.add(id(source))
        yield source
        waiting += source.inputs or []


def described(source: Any) -> tuple[str, dict[str, str]]:
    """(schema, arguments given as constants) of an operator, as DALI prints its specification."""
    head, _, arguments = str(source.spec).partition("  Arguments:\n")
    name = head.splitlines()[0].removeprefix("OpSpec for ").rstrip(":")
    pairs = (line.strip().split(": ", 1) for line in arguments.splitlines() if ": " in line)
    return name, {key: value for key, value in pairs if not key.startswith("_")}


@pytest.fixture(scope="module")
def output() -> Any:
    with pipeline():
        return graph(on_gpu=True)


def test_frames_are_decoded_resized_and_turned_on_the_gpu(output: Any) -> None:
    assert output.device == "gpu"
    used = [described(source)[0] for source in operators(output)]
    assert [name for name in used if name != "ExternalSource"] == ["Transpose", "Slice", "Resize", "Slice", "decoders__Video"]
    assert used.count("ExternalSource") == len(dali._INPUTS)


def test_every_operator_is_registered_for_its_device(output: Any) -> None:
    for source in operators(output):
        name, arguments = described(source)
        device = arguments.get("device", "cpu")
        assert name in REGISTERED[device](), f"{name} on {device}"
        schema = backend.GetSchema(name)
        assert device in schema.GetSupportedBackends()
        for place in range(source.spec.NumRegularInput()):
            given = source.spec.InputDevice(place)
            wanted = "cpu" if device == "mixed" else schema.GetInputDevice(place, given, device)
            assert given == wanted, f"input {place} of {name} on {device} lies on {given}"


def test_arguments_are_known_and_those_of_a_sample_are_on_the_cpu(output: Any) -> None:
    """DALI takes argument inputs (one value for each sample) from the CPU only."""
    per_sample = 0
    for source in operators(output):
        name, arguments = described(source)
        schema = backend.GetSchema(name)
        for argument in arguments.keys() - ADDED_BY_DALI:
            assert schema.HasArgument(argument), f"{name}({argument})"
        for place in range(source.spec.NumRegularInput(), source.spec.NumInput()):
            assert source.spec.InputDevice(place) == "cpu"
            per_sample += 1
    assert per_sample == 4  # start_frame, stride and sequence_length of the decoder, size of the resize


@pytest.mark.parametrize(("operator", "argument"), [("decoders__Video", "start_frame"), ("decoders__Video", "stride"),
                                                    ("decoders__Video", "sequence_length"), ("Resize", "size")])  # fmt: skip
def test_arguments_of_a_sample_may_differ_from_sample_to_sample(operator: str, argument: str) -> None:
    assert backend.GetSchema(operator).IsTensorArgument(argument)


def test_frames_come_out_with_four_dims_in_the_order_of_a_clip(output: Any) -> None:
    """Channels first: the decoder's frames are FHWC, `perm` takes C to the front."""
    output.source.spec.InferOutputMetadata()
    assert output.source.spec.OutputDesc(0)[1:3] == ("gpu", 4)
    assert described(output.source)[1]["perm"].replace(" ", "") == "[3,0,1,2,]"


@pytest.mark.parametrize(
    ("change", "error"),
    [({"start_frme": 1}, KeyError), ({"pad_mod": "none"}, KeyError), ({"device": "gpu"}, RuntimeError), ({"stride": "two"}, ValueError)],
)
def test_dali_refuses_other_names_devices_and_types_without_a_gpu(change: dict[str, Any], error: type[Exception]) -> None:
    """Or the tests above would show nothing."""
    with pipeline():
        content = fn.external_source(name="content")
        with pytest.raises(error):
            fn.decoders.video(content, **{"device": "mixed", "sequence_length": 3, **change})
