"""Draw ten test images and predictions, of CIFAR-10 or --synthetic ones, as predictions.png."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where cifar.py is

from torchvision.datasets import CIFAR10

import cifar

synthetic = "--synthetic" in sys.argv
net = cifar.load_model(Path("global_model.pt")).eval()
testloader = cifar.load_data(synthetic=synthetic)[1]
classes = list("0123456789")
if not synthetic:
    classes = CIFAR10(Path(cifar.DATA_ROOT).expanduser(), train=False).classes
images, labels = next(iter(testloader))
plt.figure(figsize=(8, 4))
for i, predicted in enumerate(net(images[:10]).argmax(1)):
    plt.subplot(2, 5, i + 1, xticks=[], yticks=[])
    plt.imshow((images[i].permute(1, 2, 0) + 1) / 2)
    plt.title(f"{classes[labels[i]]}\n→ {classes[predicted]}", fontsize=8)
plt.savefig("predictions.png", dpi=200)
