"""A second world of the lab: tinted Fashion-MNIST garments."""
