# Sets the suite up on Colab. Run it again as often as you like: what is there already is not done twice.
import os
import subprocess
import sys
from pathlib import Path

address = ""  # of the repository, or of your copy of it
suite = Path.home() / "topk-to-crosscoders"
had = suite.exists()
command = ["git", "-C", suite, "pull", "--quiet", "--ff-only"] if had else ["git", "clone", "--quiet", address, suite]
subprocess.run(command, check=True)
if str(suite) not in sys.path:
    sys.path.insert(0, str(suite))
os.chdir(suite)

from helpers.suite.doctor import wrong_pins  # noqa: E402 (it is there only now)

wrong = wrong_pins(Path("requirements.txt").read_text(encoding="utf-8"))
pins = [f"{name}=={pin}" for name, (_, pin) in wrong.items() if name != "torch"]  # Colab's has its GPU
if pins:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *pins], check=True)
    print("Installed. If anything was imported before: Runtime, Restart session, then run this cell again.")
print(f"Ready: open notebooks/00_tour.ipynb in {suite}")
