"""Draw the accuracy of each round: global_model.json becomes accuracy.png."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

history = json.loads(Path("global_model.json").read_text())
rounds = [record["round"] for record in history]
plt.plot(rounds, [record["accuracy"] for record in history], marker="o")
plt.xlabel("round")
plt.ylabel("accuracy")
plt.locator_params(axis="x", integer=True)
plt.savefig("accuracy.png")
