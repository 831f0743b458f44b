"""The method; see README.md."""

from dmdr import torchvision_shim

torchvision_shim.install()
