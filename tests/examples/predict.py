"""Draw ten test images, their classes and a model's predictions, as predictions.png.

pip install matplotlib
python3 tests/examples/predict.py                                 # global_model.pt
python3 tests/examples/predict.py fedprox.pt --data-root ~/images
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
from torchvision.datasets import CIFAR10, ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where cifar.py is

import cifar

parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
parser.add_argument("model", type=Path, nargs="?", default="global_model.pt", help="the model")
parser.add_argument("--data-root", default=cifar.DATA_ROOT, help="folder of the images")
parser.add_argument("--synthetic", action="store_true", help="use generated images")
args = parser.parse_args()
net = cifar.load_model(args.model).eval()
testloader = cifar.load_data(data_root=args.data_root, synthetic=args.synthetic)[1]
images, labels = next(iter(testloader))
scores = net(images[:10])
classes = [str(number) for number in range(scores.shape[1])]
if not args.synthetic:
    root = Path(args.data_root).expanduser()
    with suppress(RuntimeError):  # other images than CIFAR-10's
        classes = CIFAR10(root, train=False).classes
    with suppress(OSError):  # no images in a folder for each class, which folders.diff reads
        classes = ImageFolder(root).classes
pictures = ((images + 1) / 2).permute(0, 2, 3, 1).numpy()
plt.figure(figsize=(8, 4))
for i, predicted in enumerate(scores.argmax(1)):
    plt.subplot(2, 5, i + 1, xticks=[], yticks=[])
    plt.imshow(pictures[i], cmap="gray")  # the map is for images of one channel
    plt.title(f"{classes[labels[i]]}\n→ {classes[predicted]}", fontsize=8)
plt.savefig("predictions.png", dpi=200)
