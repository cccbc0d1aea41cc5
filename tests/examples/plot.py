"""Draw the accuracy of each round: global_model.json becomes accuracy.png.

pip install matplotlib
python3 tests/examples/plot.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

history = json.loads(Path("global_model.json").read_text())
# A round without an evaluation has no accuracy.
evaluated = [record for record in history if record.get("accuracy") is not None]
rounds = [record["round"] for record in evaluated]
plt.plot(rounds, [record["accuracy"] for record in evaluated], marker="o")
plt.xlabel("round")
plt.ylabel("accuracy")
plt.locator_params(axis="x", integer=True)
plt.savefig("accuracy.png")
