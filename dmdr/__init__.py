"""The method; docs/architecture.md shows its rooms.

The only code in a package's __init__: open_clip and lpips import torchvision, whose import fails beside a CPU build of
torch. The hook has to be there before any module of ours imports a library that imports it.
"""

from dmdr.rewards import torchvision_shim

torchvision_shim.install()
