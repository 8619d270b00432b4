"""Trains the small models in models/ on scikit-learn's bundled handwritten digits, and exports them to ONNX.

    pip install torch scikit-learn onnx onnxscript onnxruntime
    python tools/make_models.py models

Writes digits.npz (1,257 training images), digits_test.npz (540 images that no training sees), four models and
README.md with each model's provenance and its accuracy on the test images, measured with onnxruntime.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

SEED = 0


class Block(nn.Module):
    """conv-bn-relu-conv-bn, plus the input, through a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.skip(x))


class ResidualCNN(nn.Module):
    """Three residual blocks of 24, 32 and 48 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24)
        self.blocks = nn.Sequential(Block(24, 24, 1), Block(24, 32, 2), Block(32, 48, 2))
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(torch.relu(self.bn(self.stem(x))))
        return self.head(y.mean((2, 3)))


class MLP(nn.Module):
    """64-256-128-10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer over 16 patches of 2 x 2 and a class token."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class RowGRU(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(x.squeeze(1))[0][:, -1])


MODELS = {
    "digits_resnet": (ResidualCNN, 60),
    "digits_mlp": (MLP, 100),
    "digits_vit": (ViT, 200),
    "digits_gru": (RowGRU, 150),
}


def digits() -> tuple[np.ndarray, ...]:
    """Training images, test images, training labels, test labels; images are float32 (N,1,8,8) in [0,1]."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return train_test_split(images, labels.astype(np.int64), test_size=540, random_state=SEED, stratify=labels)


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    """AdamW, one cosine cycle, shifts by up to one pixel."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - 63, 64):
            pick = order[start : start + 64]
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = nn.functional.cross_entropy(model(torch.roll(x[pick], shift, (2, 3))), y[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def export(model: nn.Module, path: Path) -> None:
    """TorchScript exporter, opset 17, dynamic batch, BatchNormalization kept."""
    torch.onnx.export(
        model.eval(), torch.zeros(1, 1, 8, 8), str(path), dynamo=False, opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        input_names=["input"], output_names=["logits"], dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
    )  # fmt: skip
    onnx.checker.check_model(str(path), full_check=True)


def accuracy(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 accuracy of an ONNX file in percent."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float((session.run(None, {"input": images})[0].argmax(1) == labels).mean() * 100)


def main() -> None:
    """Writes everything into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    x_train, x_test, y_train, y_test = digits()
    np.savez_compressed(out / "digits.npz", input=x_train, labels=y_train)
    np.savez_compressed(out / "digits_test.npz", input=x_test, labels=y_test)
    rows = []
    for name, (build, epochs) in MODELS.items():
        torch.manual_seed(SEED)
        model = build()
        train(model, x_train, y_train, epochs)
        path = out / f"{name}.onnx"
        export(model, path)
        parameters = sum(p.numel() for p in model.parameters())
        rows.append((name, build.__doc__, parameters, path.stat().st_size, accuracy(path, x_test, y_test)))
        print(*rows[-1], file=sys.stderr, flush=True)
    write_readme(out, rows)


def write_readme(out: Path, rows: list[tuple]) -> None:
    """models/README.md: what each file is and how good it is."""
    lines = [
        "# Models",
        "",
        "Small real models, trained by `python tools/make_models.py models` "
        f"(PyTorch {torch.__version__}, seed {SEED}, AdamW) on the handwritten digits that come with",
        "scikit-learn (UCI ML hand-written digits, CC BY 4.0): `digits.npz` holds 1,257 training images,",
        "`digits_test.npz` 540 test images that training never saw; `input` is float32 (N,1,8,8) in [0,1], `labels`",
        "int64.",
        "",
        "| file | what | parameters | bytes | top-1 on the test images, % |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {name}.onnx | {doc} | {params:,} | {size:,} | {top1:.2f} |" for name, doc, params, size, top1 in rows]
    (out / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
