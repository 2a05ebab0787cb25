"""The operator library: schemas, opcheck, what importing costs, and work without the compiled parts."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import operator_samples
import pytest
import torch

import unlearn_fast
from unlearn_fast import _library, reference

PACKAGE = Path(unlearn_fast.__file__).parent
TESTS = Path(__file__).parent
IN_PLACE = {  # operator -> the arguments that it writes
    "token_logprobs_backward_": ["logits"],
    "token_kl_backward_": ["logits"],
    "sum_grad_squared_conv_": ["out", "first"],
    "sum_grad_squared_linear_": ["out", "first"],
    "sum_grad_squared_embedding_": ["out", "first"],
    "sum_grad_squared_scale_": ["out", "first"],
    "dampen_": ["params"],
    "dampen_undo_": ["params"],
}
SELECTION = {"dampen_record", "alpha_for_percentile", "selection_curve", "top_fraction_mask"}
CPU_KERNELS = {*SELECTION, "token_logprobs", "token_logprobs_backward", "token_kl", "token_kl_backward", *IN_PLACE}


def fresh_process(code: str, *path: Path) -> dict:
    """Runs `code` in a new interpreter that finds the package in `path` first; returns the JSON that it prints last."""
    lines = ["import sys", f"sys.path[:0] = {[str(p) for p in path]}", code]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Schemas


def test_every_registered_operator_is_declared_and_has_samples():
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    registered = {name for library, name in names if library == "unlearn_fast"}
    assert registered == set(_library.SCHEMAS) == set(operator_samples.samples())


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_mutation_is_declared(name):
    schema = getattr(torch.ops.unlearn_fast, name).default._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == IN_PLACE.get(name, [])
    assert not any(result.alias_info for result in schema.returns)


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_opcheck(name):
    operator = getattr(torch.ops.unlearn_fast, name).default
    for arguments in operator_samples.samples()[name]:
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    "name",
    [
        "alpha_for_percentile",
        "dampen_",
        "linear_token_logprobs",
        "selection_curve",
        "sum_grad_squared_conv_",
        "sum_grad_squared_embedding_",
        "sum_grad_squared_linear_",
        "sum_grad_squared_scale_",
        "token_kl",
        "token_logprobs",
        "token_statistics",
        "top_fraction_mask",
    ],
)
def test_references_have_the_same_arguments(name):
    """Same names in the same order, and the same defaults where the reference uses the argument."""
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (unlearn_fast, reference))
    ours = {n: p for n, p in ours.items() if n != "undo"}  # whose reference is a function of its own
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    assert all(ours[n].default == p.default for n, p in theirs.items() if n != "chunk_bytes")


# Which implementation serves


@pytest.mark.skipif("cpu" in _library.missing, reason="the compiled part is not built")
def test_compiled_kernels_serve_here():
    assert {n for n in _library.SCHEMAS if _library.implementation(n, "cpu") == "c++"} == CPU_KERNELS
    assert _library.native is not None and _library.native.simd() in ("avx512", "avx2", "baseline")


def test_cuda_is_missing_for_a_reason_or_loaded():
    assert "cuda" in _library.missing or _library.implementation("dampen_", "cuda") == "cuda"
    if torch.version.cuda is None:
        assert "has no CUDA" in _library.missing["cuda"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "mps"])
def test_every_operator_has_an_implementation_everywhere(device):
    assert {_library.implementation(n, device) for n in _library.SCHEMAS} <= {"c++", "cuda", "triton", "reference"}


# Importing


def test_importing_loads_nothing_beyond_torch_but_the_package_itself():
    """So that it costs what its own few files cost, wherever it runs: no optional package, no compiler of torch's."""
    loaded = fresh_process(
        "import torch; before = set(sys.modules); import unlearn_fast, json;"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - {'json'})))",
        PACKAGE.parent,
    )
    finders = [name for name in loaded if name.startswith("__editable__")]
    assert [name for name in loaded if name not in finders] == ["unlearn_fast"]


# Without the compiled parts


@pytest.fixture(scope="module")
def without_compiled_parts(tmp_path_factory) -> Path:
    """A folder with the package's Python files alone."""
    folder = tmp_path_factory.mktemp("python_only")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignore)
    return folder


def test_the_references_serve_with_one_warning(without_compiled_parts):
    told = fresh_process(
        """
import json, warnings
warnings.simplefilter("always")
import torch, unlearn_fast
from unlearn_fast import _library
x, labels, weight = torch.randn(3, 5, requires_grad=True), torch.tensor([0, -100, 4]), torch.randn(5, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        unlearn_fast.token_logprobs(x, labels).sum().backward()
        unlearn_fast.token_logprobs(x * 1, labels, inplace_backward=True).sum().backward()
        unlearn_fast.linear_token_logprobs(x, weight, labels).sum().backward()
        unlearn_fast.token_kl(x, x.detach(), labels).sum().backward()
        unlearn_fast.sum_grad_squared_linear_(torch.zeros(5, 5), x, x)
        unlearn_fast.sum_grad_squared_embedding_(torch.zeros(5, 5), torch.zeros(1, 3).long(), x[None])
        unlearn_fast.sum_grad_squared_scale_(torch.zeros(5), None, x[None])
        unlearn_fast.sum_grad_squared_conv_(torch.zeros(5, 5, 3), x[..., None], x[..., None], padding=1)
        unlearn_fast.dampen_([torch.ones(3)], [torch.ones(3)], [torch.zeros(3)], alpha=1.0)
print(json.dumps({
    "file": unlearn_fast.__file__, "missing": _library.missing, "native": _library.native is not None,
    "warnings": [(w.category.__name__, str(w.message), w.filename) for w in caught],
    "served": {name: _library.implementation(name, "cpu") for name in _library.SCHEMAS},
}))
""",
        without_compiled_parts,
    )
    assert told["file"].startswith(str(without_compiled_parts))
    assert set(told["served"].values()) == {"reference"} and not told["native"]
    reason = "the package was not built: run `pip install .`"
    assert told["missing"]["cpu"] == told["missing"]["native"] == reason
    ((category, message, filename),) = told["warnings"]
    assert category == "RuntimeWarning" and reason in message and "slow plain-torch references on cpu" in message
    assert filename == "<string>"  # the caller's line, not the library's


def test_the_reason_of_the_build_is_kept(without_compiled_parts):
    record = without_compiled_parts / PACKAGE.name / "_build.json"
    record.write_text(json.dumps({"missing": "`cmake -S` failed: no compiler"}))
    broken = without_compiled_parts / PACKAGE.name / "_cpu.so"
    broken.write_bytes(b"not a library")
    try:
        code = "import json; from unlearn_fast import _library; print(json.dumps(_library.missing))"
        missing = fresh_process(code, without_compiled_parts)
    finally:
        record.unlink(), broken.unlink()
    assert missing["native"] == "`cmake -S` failed: no compiler"
    assert missing["cpu"].startswith("_cpu.so cannot be loaded: ")


def test_the_references_are_as_accurate_as_torch(without_compiled_parts):
    """The operators' own checks, but for the last digits, which only the kernels promise."""
    failures = fresh_process(
        """
import itertools, json, warnings
warnings.simplefilter("ignore")
import torch, unlearn_fast
import test_dampen, test_dampen_align, test_inplace_backward, test_linear_token_logprobs, test_token_kl
import test_token_statistics
import test_sum_grad_squared_embedding, test_sum_grad_squared_linear, test_sum_grad_squared_scale, test_token_logprobs
from accuracy import assert_accurate, assert_as_accurate
from layouts import DTYPES, LAYOUTS, lay_out

failures = []

def check(name, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        failures.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")

def confident(distance):
    logits = torch.zeros(1, 5)
    logits[0, 2] = distance
    logp, gradient = test_token_logprobs.values_and_gradient(unlearn_fast, [logits, torch.tensor([2]), torch.ones(1)])
    k, floor = 4 * torch.tensor(-distance, dtype=torch.float64).exp(), distance * torch.finfo(torch.float32).eps
    assert_accurate(logp[0], -k.log1p(), floor=floor)
    assert_accurate(gradient[0, 2], k / (1 + k), floor=floor)

token = test_token_logprobs
for dtype, layout in itertools.product(DTYPES, LAYOUTS):
    logits, labels, grad = token.make_inputs((3, 4), 33, dtype)
    inputs = [lay_out(logits, layout), lay_out(labels, layout), grad]
    check(f"token {dtype} {layout}", assert_as_accurate, token.parts, inputs, dtype, truth=token.exact_parts)
    if dtype in (torch.float32, torch.float64):
        inputs[0] = inputs[0] + 2**16  # exact, as the logits are multiples of 1/8 near 0
        check(f"large token {dtype} {layout}", assert_as_accurate, token.parts, inputs, dtype, truth=token.exact_parts)
statistics, kl = test_token_statistics, test_token_kl
for dtype, scaling in itertools.product(DTYPES, statistics.SCALINGS):
    inputs = statistics.make_inputs((3, 4), 33, dtype)
    check(f"statistics {dtype} {scaling}", statistics.assert_right, inputs, **scaling)
for dtype, options in itertools.product(DTYPES, kl.OPTIONS):
    check(f"kl {dtype} {options}", kl.assert_right, kl.make_inputs((3, 4), 33, dtype), **options)
for dtype, inplace in itertools.product(DTYPES, (False, True)):
    for module in (statistics, kl):
        test = module.test_ignored_rows_are_exactly_zero_whatever_they_hold
        check(f"ignored rows of {module.__name__} {dtype}", test, dtype, inplace)
check("hit", statistics.test_hit_counts_ties)
check("penalty", kl.test_the_penalty_is_that_of_undial)
for distance in (20.0, 60.0):
    check(f"confident {distance}", confident, distance)
check("all ignored", token.test_every_row_ignored, -100)
for dtype, inplace in itertools.product(DTYPES, (False, True)):
    check(f"ignored {dtype}", token.test_ignored_rows_are_exactly_zero_whatever_they_hold, dtype, inplace)
for name, make_logits in test_inplace_backward.SAFE.items():
    check(f"in place {name}", test_inplace_backward.test_same_gradient, make_logits)
for dtype in DTYPES:
    check(f"linear {dtype}", test_linear_token_logprobs.test_a_larger_problem, dtype)
for dtype, leading in itertools.product(DTYPES, ((7,), (3, 4))):
    squares = test_sum_grad_squared_linear
    check(f"squares {dtype} {leading}", squares.assert_right, squares.make_inputs(leading, 5, 9, dtype), dtype)
for dtype, plain in itertools.product(DTYPES, (False, True)):
    embedding, scale = test_sum_grad_squared_embedding, test_sum_grad_squared_scale
    check(f"embedding {dtype}", embedding.assert_right, embedding.make_inputs(2, 7, 5, 4, dtype), dtype, plain=plain)
    check(f"scale {dtype}", scale.assert_right, scale.make_inputs(2, 7, 5, dtype), dtype, plain=plain)
    check(f"bias {dtype}", scale.assert_right, scale.make_inputs(2, 7, 5, dtype), dtype, plain=plain, bias=True)
check("rows", embedding.test_rows_that_do_not_occur_keep_their_bits, torch.int32)
check("too large a token", embedding.test_an_empty_table)
for settings in test_dampen.SETTINGS:
    if settings.get("exponent") != 0.5:
        check(f"dampen {settings}", test_dampen.test_released_formula_bit_for_bit, 1023, settings)
for edge in test_dampen.EDGES:
    check(f"dampen {edge}", test_dampen.test_edge_case, unlearn_fast.dampen_, *edge)
check("report", test_dampen.test_report)
check("names", test_dampen_align.test_names_are_matched_in_any_order_and_lists_by_position)
print(json.dumps([unlearn_fast.__file__, *failures]))
""",
        without_compiled_parts,
        TESTS,
    )
    assert failures.pop(0).startswith(str(without_compiled_parts))
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_opcheck_on_the_references(without_compiled_parts):
    """torch.compile trusts the declared shapes and strides of whatever serves."""
    failures = fresh_process(
        """
import json, torch, unlearn_fast, operator_samples
failures = []
for name, samples in operator_samples.samples().items():
    for index, arguments in enumerate(samples):
        try:
            torch.library.opcheck(getattr(torch.ops.unlearn_fast, name).default, arguments)
        except Exception as error:
            failures.append(f"{name} {index}: {str(error)[:300]}")
print(json.dumps(failures))
""",
        without_compiled_parts,
        TESTS,
    )
    assert not failures, "\n".join(failures)
