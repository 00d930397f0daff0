"""Each operation of the evaluator against PyTorch, on random input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from builders.mil_evaluator import UnusablePackage, package  # noqa: F401  # fills the table of operations
from builders.mil_evaluator.elementwise import erf
from builders.mil_evaluator.operands import Operands, Value, function_of, known_operations
from builders.mil_evaluator.types import Array, TensorType, rounded
from builders.mil_evaluator.weights import unpack_bits

# float32 against float32: sums in another order.
TOLERANCE = 2e-6


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(*values: int) -> Array:
    return np.array(values, np.int32)


def evaluate(kind: str, given: dict[str, Value | list[Array]], output: str = "fp32") -> Array | tuple[Array, ...]:
    values = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in given.items()}
    return function_of(kind)(Operands(kind, values, TensorType(output, ())))


X, Y = random(2, 3, 5, 4), random(2, 3, 5, 4, seed=1)
TX, TY = torch.from_numpy(X), torch.from_numpy(Y)
TRUE, FALSE = np.array(True), np.array(False)
PICTURE = random(1, 3, 9, 8)
KERNELS, BIAS = random(6, 3, 3, 2, seed=2), random(6, seed=3)
HEADS = [random(1, 2, 7, 4, seed=seed) for seed in range(3)]
MASK = np.array([True, True, False, True, True, False, True])[None, None, None]

CASES: list[tuple[str, dict[str, Value | list[Array]], Callable[[], Tensor]]] = [
    ("add", {"x": X, "y": Y}, lambda: TX + TY),
    ("sub", {"x": X, "y": Y[0]}, lambda: TX - TY[0]),
    ("mul", {"x": X, "y": Y}, lambda: TX * TY),
    ("real_div", {"x": X, "y": Y}, lambda: TX / TY),
    ("maximum", {"x": X, "y": Y}, lambda: torch.maximum(TX, TY)),
    ("minimum", {"x": X, "y": Y}, lambda: torch.minimum(TX, TY)),
    ("equal", {"x": X, "y": X.round()}, lambda: TX.round() == TX),
    ("not_equal", {"x": integers(1, 0, 2), "y": np.int32(0)[None]}, lambda: torch.tensor([True, False, True])),
    ("greater_equal", {"x": X, "y": Y}, lambda: TX >= TY),
    ("select", {"cond": X > 0, "a": X, "b": Y}, lambda: torch.where(TX > 0, TX, TY)),
    ("cast", {"x": X}, lambda: TX),
    ("relu", {"x": X}, lambda: F.relu(TX)),
    ("sigmoid", {"x": 100 * X}, lambda: torch.sigmoid(100 * TX)),
    ("gelu", {"x": X, "mode": "EXACT"}, lambda: F.gelu(TX)),
    ("reshape", {"x": X, "shape": integers(0, -1, 2)}, lambda: TX.reshape(2, 30, 2)),
    ("transpose", {"x": X, "perm": integers(0, 2, -3, -1)}, lambda: TX.permute(0, 2, 1, 3)),
    ("expand_dims", {"x": X, "axes": integers(1)}, lambda: TX[:, None]),
    ("squeeze", {"x": X[:, :1], "axes": integers(1)}, lambda: TX[:, 0]),
    ("concat", {"values": [X, Y], "axis": np.int32(1)[None]}, lambda: torch.cat([TX, TY], 1)),
    ("split", {"x": X, "split_sizes": integers(2, 3), "axis": integers(2)}, lambda: TX.split([2, 3], 2)[1]),
    (
        "slice_by_index",
        {
            "x": X, "begin": integers(0, 1, 0, 3), "end": integers(0, 2, 4, 4), "stride": integers(1, 1, 2, 1),
            "begin_mask": np.array([1, 0, 0, 0], bool), "end_mask": np.array([1, 0, 0, 0], bool),
            "squeeze_mask": np.array([0, 1, 0, 0], bool),
        },
        lambda: TX[:, 1, 0:4:2, 3:4],
    ),
    ("tile", {"x": X, "reps": integers(1, 2, 1, 3)}, lambda: TX.tile(1, 2, 1, 3)),
    ("shape", {"x": X}, lambda: torch.tensor(TX.shape)),
    ("gather", {"x": X, "indices": integers(3, 0, -1), "axis": integers(2)}, lambda: TX[:, :, [3, 0, -1]]),
    ("range_1d", {"start": np.array(2), "end": np.array(9), "step": np.array(3)}, lambda: torch.arange(2, 9, 3)),
    (
        "linear",
        {"x": X, "weight": random(6, 4, seed=4), "bias": BIAS},
        lambda: F.linear(TX, torch.from_numpy(random(6, 4, seed=4)), torch.from_numpy(BIAS)),
    ),
    ("matmul", {"x": X, "y": Y, "transpose_x": FALSE, "transpose_y": TRUE}, lambda: TX @ TY.mT),
    ("matmul", {"x": X, "y": Y, "transpose_x": TRUE, "transpose_y": FALSE}, lambda: TX.mT @ TY),
    (
        "conv",
        {"x": PICTURE, "weight": KERNELS, "bias": BIAS, "pad_type": "valid", "strides": integers(1, 1)},
        lambda: F.conv2d(*map(torch.from_numpy, (PICTURE, KERNELS, BIAS))),
    ),
    (
        "conv",
        {"x": PICTURE, "weight": KERNELS, "pad_type": "custom", "pad": integers(1, 1, 2, 2), "strides": integers(2, 3)},
        lambda: F.conv2d(*map(torch.from_numpy, (PICTURE, KERNELS)), padding=(1, 2), stride=(2, 3)),
    ),
    (
        "avg_pool",
        {"x": PICTURE, "kernel_sizes": integers(2, 3), "strides": integers(2, 1), "pad_type": "valid"},
        lambda: F.avg_pool2d(torch.from_numpy(PICTURE), (2, 3), (2, 1)),
    ),
    (
        "layer_norm",
        {"x": X, "axes": integers(-1), "gamma": BIAS[:4], "beta": BIAS[2:], "epsilon": np.array(1e-5, np.float32)},
        lambda: F.layer_norm(TX, (4,), torch.from_numpy(BIAS[:4]), torch.from_numpy(BIAS[2:]), 1e-5),
    ),
    ("softmax", {"x": 50 * X, "axis": integers(1)}, lambda: F.softmax(50 * TX, 1)),
    ("reduce_mean", {"x": X, "axes": integers(1, 2), "keep_dims": TRUE}, lambda: TX.mean((1, 2), keepdim=True)),
    ("reduce_l2_norm", {"x": X, "axes": integers(-1), "keep_dims": FALSE}, lambda: TX.norm(dim=-1)),
    (
        "scaled_dot_product_attention",
        {"query": HEADS[0], "key": HEADS[1], "value": HEADS[2], "attn_mask": MASK},
        lambda: F.scaled_dot_product_attention(*map(torch.from_numpy, HEADS), attn_mask=torch.from_numpy(MASK)),
    ),
    (
        "scaled_dot_product_attention",
        {"query": HEADS[0][:, :, :1], "key": HEADS[1], "value": HEADS[2]},
        lambda: F.scaled_dot_product_attention(*map(torch.from_numpy, (HEADS[0][:, :, :1], *HEADS[1:]))),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "reference"), CASES, ids=[kind for kind, _, _ in CASES])
def test_an_operation_computes_what_pytorch_does(
    kind: str, given: dict[str, Value | list[Array]], reference: Callable[[], Tensor]
) -> None:
    result = evaluate(kind, given)
    found, expected = (result[1] if isinstance(result, tuple) else result), reference().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_operation_is_tested() -> None:
    """The compressed weights are below."""
    assert known_operations() == {kind for kind, _, _ in CASES} | {
        "constexpr_lut_to_dense", "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale"
    }  # fmt: skip


def test_the_error_function_is_within_its_bound_everywhere() -> None:
    x = np.linspace(-6, 6, 100_001, dtype=np.float32)
    expected = torch.erf(torch.from_numpy(x).double()).numpy()
    assert np.abs(erf(x) - expected).max() < 6e-7  # 1.5e-7 of the formula, and float32's own


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_packed_integers_begin_at_the_lowest_bit(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, 21)
    number = sum(int(value) << (bits * place) for place, value in enumerate(values))
    packed = np.frombuffer(number.to_bytes(-(-21 * bits // 8), "little"), np.uint8)
    assert unpack_bits(packed, bits, 21).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [6, 8])
def test_a_palette_of_ios_16_is_indices_end_to_end(bits: int) -> None:
    palette, shape = random(1 << bits), (5, 3)
    indices = np.random.default_rng(1).integers(0, 1 << bits, 15)
    number = sum(int(value) << (bits * place) for place, value in enumerate(indices))
    packed = np.frombuffer(number.to_bytes(-(-15 * bits // 8), "little"), np.uint8)
    given: dict[str, Value | list[Array]] = {"indices": packed, "lut": palette, "shape": np.array(shape, np.uint32)}
    assert np.array_equal(evaluate("constexpr_lut_to_dense", given), palette[indices].reshape(shape))


def test_a_palette_of_ios_18_may_differ_by_block() -> None:
    palettes = random(2, 1, 4, 1)  # rows 0 to 2 and rows 3 to 5 have one each
    indices = np.random.default_rng(1).integers(0, 4, (6, 5)).astype(np.uint8)
    expected = np.concatenate([palettes[0].ravel()[indices[:3]], palettes[1].ravel()[indices[3:]]])
    assert np.array_equal(evaluate("constexpr_lut_to_dense", {"indices": indices, "lut": palettes}), expected)


def test_integers_with_a_scale_a_row() -> None:
    data = np.random.default_rng(1).integers(-128, 128, (4, 3)).astype(np.int8)
    scale, zero = np.abs(random(4)), np.array([0, 1, -2, 3], np.int8)
    expected = (
        (torch.from_numpy(data).float() - torch.from_numpy(zero)[:, None]) * torch.from_numpy(scale)[:, None]
    ).numpy()
    of_ios_16: dict[str, Value | list[Array]] = {
        "quantized_data": data, "scale": scale, "zero_point": zero, "axis": np.int32(0)[None]
    }  # fmt: skip
    np.testing.assert_allclose(evaluate("constexpr_affine_dequantize", of_ios_16), expected, rtol=1e-6)
    of_ios_18: dict[str, Value | list[Array]] = {"data": data, "scale": scale[:, None], "offset": zero[:, None]}
    np.testing.assert_allclose(evaluate("constexpr_blockwise_shift_scale", of_ios_18), expected, rtol=1e-6)


def test_a_scale_may_hold_for_a_block() -> None:
    data, scale = np.ones((2, 6), np.int8), np.array([[1, 2, 3]], np.float32)
    result = evaluate("constexpr_blockwise_shift_scale", {"data": data, "scale": scale})
    assert np.asarray(result).tolist() == [[1, 1, 2, 2, 3, 3]] * 2


def test_half_precision_is_rounded_to_as_torch_rounds() -> None:
    values = np.concatenate([random(1000), 1e5 * random(1000), 1e-7 * random(1000)])
    assert np.array_equal(rounded(values, "fp16"), torch.from_numpy(values).half().float().numpy())


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        ("conv", {"x": PICTURE, "weight": KERNELS, "pad_type": "same"}, "conv with padding same"),
        ("conv", {"x": PICTURE, "weight": KERNELS, "groups": integers(3)}, "conv with groups"),
        ("conv", {"x": PICTURE, "weight": KERNELS, "dilations": integers(2, 1)}, "conv with dilations"),
        ("avg_pool", {"x": PICTURE, "pad_type": "custom", "pad": integers(1, 1, 0, 0)}, "avg_pool with padding"),
        ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}, "gelu in mode TANH_APPROXIMATION"),
        ("gather", {"x": X, "indices": integers(9), "axis": integers(0)}, r"gather with an index outside 0\.\.1"),
        ("real_div", {"x": integers(4), "y": integers(2)}, "real_div of integers"),
        ("lstm", {}, "the evaluator does not know operation lstm"),
    ],
)
def test_what_is_not_known_is_said(kind: str, given: dict[str, Value | list[Array]], sentence: str) -> None:
    """Never computed otherwise than the program says."""
    with pytest.raises(UnusablePackage, match=sentence):
        evaluate(kind, given)
